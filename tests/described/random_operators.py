"""Descriptions made at random: axes, expressions, attributes, tensors that may be there, launches, workspace."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from described import TYPED, probe
from pyfmha.errors import SpecError
from pyfmha.operators.description import Attribute, Check, Launch, Operator, Option, Part, Tensor, Types
from pyfmha.operators.program import program_of
from pyfmha.operators.trials import check_absent

RANDOM = [f"Random{number}" for number in range(20)]
"""The names of those of every run; the name is the seed."""

_NUMBERS = (0, 1, 2, 3, 4, 7, 16, 100, 1 << 20, (1 << 31) - 1, 1 << 40)
_FLOATS = ("0.0", "1.0", "0.5", "-2.25", "3e38", "1e300", "0.1")
_TYPES = ("fp32", "fp16", "bf16", "int32", "int64", "int8", "bool", "uint8")
_WORDS = ("", "sum", "mean", "it's", 'say "so"', "\u03c0\U0001f600", "?\\?")


class Describer:
    """Makes one description; what it makes may contradict itself.

    Args:
        chance: where all choices come from.
        name: of the operator.
    """

    def __init__(self, chance: random.Random, name: str) -> None:
        self.chance, self.name = chance, name
        self.ints: list[str] = []
        self.floats: list[str] = []
        self.words: list[str] = []
        self.conditions: list[str] = []
        self.axes: list[str] = []
        self.tensors: list[str] = []
        self.types: dict[str, Any] = {}

    def one(self, given: Sequence[Any]) -> Any:
        return self.chance.choice(given)

    def often(self, part: float) -> bool:
        return self.chance.random() < part

    # ------------------------------------------------------------------ expressions

    def integer(self, depth: int = 2, atoms: Sequence[str] | None = None) -> str:
        there = self.ints if atoms is None else atoms
        if depth == 0 or self.often(0.3):
            return self.one(there) if there and self.often(0.75) else str(self.one(_NUMBERS[:8]))
        left, right = self.integer(depth - 1, atoms), self.integer(depth - 1, atoms)
        kind = self.one(("+", "-", "*", "*", "//", "/", "%", "cdiv", "min", "max", "if"))
        if kind in ("//", "/", "%", "cdiv") and self.often(0.9):
            right = str(self.one((2, 3, 16, -2)))
        if kind in ("cdiv", "min", "max"):
            return f"{kind}({left}, {right})"
        if kind == "if":
            return f"({left} if {self.condition(depth - 1)} else {right})" if atoms is None else f"({left} + {right})"
        return f"({left} {kind} {right})"

    def condition(self, depth: int = 1) -> str:
        if self.conditions and self.often(0.4):
            return str(self.one(self.conditions))
        if depth > 0 and self.often(0.4):
            left, right = self.condition(depth - 1), self.condition(depth - 1)
            return self.one((f"({left} and {right})", f"({left} or {right})", f"(not {left})"))
        if self.words and self.often(0.3):
            return f"{self.one(self.words)} {self.one(('==', '!='))} {self.one(_WORDS)!r}"
        if self.floats and self.often(0.3):
            return f"{self.floating(1)} {self.one(('<', '>='))} {self.one(_FLOATS)}"
        return f"{self.integer(1)} {self.one(('==', '!=', '<', '<=', '>', '>='))} {self.integer(1)}"

    def floating(self, depth: int = 2) -> str:
        if depth == 0 or self.often(0.3):
            return self.one(self.floats) if self.floats and self.often(0.7) else str(self.one(_FLOATS))
        left, right = self.floating(depth - 1), self.floating(depth - 1)
        if self.often(0.2):
            right = self.integer(1)
        kind = self.one(("+", "-", "*", "/", "min", "max"))
        return f"{kind}({left}, {right})" if kind in ("min", "max") else f"({left} {kind} {right})"

    # ------------------------------------------------------------------ attributes

    def attributes(self) -> dict[str, Attribute]:
        made: dict[str, Attribute] = {}
        for number in range(self.chance.randrange(5)):
            name = self.one((f"p{number}", f"stride{number}", f"len_{number}"))
            made[name] = self.attribute(name)
            kind = made[name].type
            if kind.endswith("[]"):
                place = f"{name}[{self.one((0, 1, f'len({name}) - 1'))}]"
                (self.floats if kind == "fp32[]" else self.ints).append(place)
                self.ints.append(f"len({name})")
            else:
                {"string": self.words, "fp32": self.floats}.get(kind, self.ints).append(name)
            self.conditions.append(f"given({name})")
        return made

    def attribute(self, name: str) -> Attribute:
        kind = self.one(("int32", "int32", "int64", "fp32", "string", "int32[]", "int64[]", "fp32[]"))
        if kind == "string":
            choices = self.one(((), _WORDS[:4], _WORDS))
            default = None if self.often(0.2) else self.one(choices or _WORDS)
            if default is not None and self.words and self.often(0.3):
                default = f"={self.one(self.words)} if {self.condition(0)} else {default!r}"
            return Attribute(kind, default, choices=choices)
        low, high = self.one(((None, None), (0, None), (0, 100), (None, 7), (-3, 4)))
        if kind.endswith("[]"):
            default = self.one((None, "[]", "[1, 2]", "[0, 3, 1]" if kind != "fp32[]" else "[0.5, 1]"))
        else:
            plain = self.often(0.7) or not (self.ints if kind != "fp32" else self.floats)
            default = self.one((None, 0, 1, 3))
            if default is not None and not plain:
                default = self.integer(1, [i for i in self.ints if i.isidentifier()]) if kind != "fp32" else "1.5 * 2"
        choices = (0, 1, 3) if self.often(0.2) else ()
        stored = "" if self.often(0.85) or default is None else f"given({name})"
        stores = f"min({name}, 3)" if kind in ("int32", "int64") and self.often(0.15) else ""
        return Attribute(kind, default, minimum=low, maximum=high, choices=choices, stored=stored, stores=stores)

    def text(self) -> str:
        """A text of messages."""
        holes = [self.integer(1), self.floating(1), *(f"{word}:r" for word in self.words[:1])]
        return f"{{{self.one(holes)}}} of {{{{it}}}} \u03c0, {{{self.one(holes)}}}"

    # ------------------------------------------------------------------ tensors

    def type(self) -> str:
        return self.one((*self.types, *self.types, self.one(_TYPES)))

    def input_axis(self, mayname: bool) -> str:
        fresh = f"{self.one('abcdefgh')}{len(self.axes)}"
        kind = self.chance.random()
        if (mayname and kind < 0.45) or not self.axes:
            self.axes.append(fresh)
            return fresh
        known = self.one(self.axes)
        if kind < 0.6:
            return known
        if kind < 0.7:
            return str(self.one((1, 2, 3)))
        if kind < 0.8 and mayname:
            self.axes.append(fresh)
            return self.one((f"{known} + {fresh}", f"2 * {fresh} + 1", f"{fresh} * 3", f"3 * {known} - {fresh}"))
        early = [i for i in self.ints if i.isidentifier()]
        return self.one((f"{known} + 1", f"{known} // 2", f"cdiv({known}, 3)", *(f"{i} + 1" for i in early)))

    def tensor(self, name: str, when: str = "") -> Tensor:
        count = self.one((0, 1, 1, 2, 2, 3, 4, 8))
        axes = [self.input_axis(not when) for _ in range(count)]
        forms = [f"{self.type()}[{', '.join(axes)}]"]
        if self.often(0.15) and not when and count:
            forms.append(f"{forms[0].partition('[')[0]}[{', '.join([*axes, self.input_axis(False)])}]")
        self.tensors.append(name)
        return Tensor(name, tuple(forms), when)

    def output(self, name: str, when: str, values: Sequence[str]) -> Tensor:
        atoms = [*self.axes, *(i for i in self.ints if i.isidentifier()), *values]
        count = self.one((0, 1, 2, 2, 3, 8))
        axes = [self.one(self.axes) if self.often(0.6) and self.axes else self.integer(1, atoms) for _ in range(count)]
        self.tensors.append(name)
        form = f"{self.type()}[{', '.join([*values, *axes][:8])}]"
        if self.often(0.2) and self.axes and not values:
            test = self.condition(0)
            return Tensor(name, (f"{form} if {test}", f"{self.type()}[{self.one(self.axes)}] if not ({test})"), when)
        return Tensor(name, form, when)

    # ------------------------------------------------------------------ the whole

    def launches(self, parts: Sequence[str]) -> list[Launch]:
        def pointer() -> str:
            of = self.one([*self.tensors, *parts, "null"])
            moved = f" + {self.integer(1)}" if of != "null" and self.often(0.2) else ""
            other = self.one([*self.tensors, *parts, "null"])
            return f"{of}{moved} if {self.condition()} else {other}" if self.often(0.15) else of + moved

        made = []
        typed = [name for name, kinds in self.types.items() if set(kinds.names) <= set(TYPED)]
        for number in range(self.one((1, 1, 2, 3))):
            numbers = {"i": self.integer(), "j": self.integer(), "f": self.floating(), "g": self.floating()}
            numbers["k"] = f"min(255, max(0, {self.integer(1)}))" if self.often(0.8) else self.integer(1)
            pointers = {of: pointer() for of in "abc"}
            function = "probe"
            if typed and self.often(0.3):
                function = f"probe_{{{self.one(typed)}}}"
                pointers = dict.fromkeys("abc", "null")
            when = "" if number == 0 and self.often(0.7) else self.condition()
            made.append(probe(function, when, **pointers, **numbers))
        return made

    def make(self) -> Operator:
        """The description."""
        attributes = self.attributes()
        for name in self.chance.sample("TU", self.chance.randrange(3)):
            self.types[name] = Types(self.chance.sample(_TYPES, self.one((1, 2, 3))) if self.often(0.6) else TYPED)
        holders = [n for n, kind in attributes.items() if kind.type == "int32" and kind.default is None]
        if holders and self.types and self.often(0.3):
            name = self.one(list(self.types))
            self.types[name] = Types(self.types[name].names, holders[0])
        define = {}
        if self.often(0.4):
            define["early"] = self.integer(2, [i for i in self.ints if i.isidentifier()])
        summary = [("", self.text()), (self.condition(0), self.text())] if self.often(0.3) else []
        options = [Option("fast", 3, self.condition(0) if self.often(0.4) else "")] if self.often(0.3) else []
        if options:
            self.conditions.append("has(fast)")
        inputs: list[Any] = [self.tensor("X")]
        for name in self.chance.sample(("W", "bias_", "Index"), self.chance.randrange(3)):
            inputs.append(self.tensor(name, self.condition() if self.often(0.4) else ""))
        values = [f"S[{i}]" for i in range(self.one((0, 0, 1, 2)))]
        if values:
            inputs.insert(self.chance.randrange(len(inputs) + 1), Tensor("S", f"shape[{len(values)}]"))
        checks = []
        if self.often(0.3):
            checks.append(Check(f"{self.condition()} or 1 == 1", "never said"))
        outputs = [self.output("Y", "", values)]
        if self.often(0.4):
            outputs.append(self.output("Z", self.condition() if self.often(0.6) else "", ()))
        define |= self.late(values, "early" in define)
        if self.often(0.3):
            checks.append(
                Check(f"{self.condition()} or {self.ints[-1]} < 100", f"{{{self.ints[-1]}}} of {{{self.floating(1)}}}")
            )
        workspace = [
            Part(f"P{n}", self.integer(2), self.condition() if self.often(0.3) else "")
            for n in range(self.one((0, 0, 1, 2)))
        ]
        launches = self.launches([part.name for part in workspace])
        if options:
            launches.append(replace(launches[0], when="has(fast)", function=self.one(("probe", "none")), option="fast"))
        made = Operator(
            self.name,
            inputs,
            outputs,
            launches,
            options=options,
            summary=summary,
            shape_summary=[("", self.text()), (self.condition(1), self.text())] if self.often(0.3) else [],
            labels={self.axes[0]: "the first"} if self.often(0.2) and self.axes else {},
            namespace=self.one(("", "acme", "acme.more")),
            types=self.types,
            attributes=attributes,
            define=define,
            checks=checks,
            workspace=workspace,
            alignment=self.one((1, 3, 16, 256)),
            workspace_of_profile=f"4 * least({self.axes[0]}) + {self.integer(1)}"
            if self.often(0.2) and self.axes
            else "",
        )
        return made

    def late(self, values: Sequence[str], early: bool) -> dict[str, str]:
        """What sizes tell: questions become atoms, and a definition or two."""
        self.ints += [*self.axes, *values, *(["early"] if early else [])]
        self.ints += [f"numel({tensor})" for tensor in self.tensors]
        self.ints += [f"{self.one(('size', 'stride'))}({self.tensors[0]}, {self.one((0, 0, 1))})"]
        self.ints += [f"itemsize({name})" for name in self.types]
        found = {}
        for name in ("late", "later")[: self.one((0, 0, 1, 2))]:
            found[name] = self.integer(2)
            self.ints.append(name)
        if self.often(0.3):
            found["whether"] = f"{self.condition()} and 1 == 1"
            self.conditions.append("whether")
        return found


def random_operator(chance: random.Random, name: str) -> Operator:
    """A description that does not contradict itself."""
    while True:
        try:
            made = Describer(chance, name).make()
            program_of(made)
            check_absent(made)
        except SpecError:
            continue
        return made


def random_values(operator: Operator, chance: random.Random) -> dict[str, Any]:
    """Attributes, most of them allowed."""
    found: dict[str, Any] = {}
    for name, kind in operator.attributes:
        if kind.default is not None and chance.random() < 0.5:
            continue
        base = kind.type.removesuffix("[]")
        pool: list[Any] = list(kind.choices)
        if base == "string":
            pool += [] if pool else [*_WORDS, "x" * 300]
        elif not pool or chance.random() < 0.1:
            low = kind.minimum if kind.minimum is not None else -3
            high = kind.maximum if kind.maximum is not None else 9
            pool = [low, high, 0, 1, 2, chance.choice((low - 1, high + 1, 1)), 1.5 if base == "fp32" else 3]
        held = [types.attribute for _, types in operator.types]
        if name in held and chance.random() < 0.9:
            pool = [0, 1, 3, 7]
        if kind.type.endswith("[]"):
            found[name] = tuple(chance.choice(pool) for _ in range(chance.choice((0, 1, 2, 2, 3))))
        else:
            found[name] = chance.choice(pool)
    return found
