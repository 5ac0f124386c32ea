"""What was found in a model, what became of it and why: for people as a table, for programs as JSON."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from pyfmha.attention.families import DEFAULT
from pyfmha.trt.attention.problem import Problem


@dataclass(frozen=True)
class Found:
    """One attention of a model.

    Attributes:
        name: of its node; of one written in several, of the last.
        kind: the operator, or ``decomposed``.
        problem: what the plugin's node that replaced it serves; None where it is left alone.
        reason: why it is left alone.
    """

    name: str
    kind: str
    problem: Problem | None = None
    reason: str = ""

    @property
    def replaced(self) -> bool:
        """Whether the plugin's node stands in its place."""
        return self.problem is not None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what the table shows, and the plugin's attributes."""
        entry: dict[str, Any] = {"name": self.name, "kind": self.kind, "replaced": self.replaced}
        if self.problem is None:
            return entry | {"reason": self.reason}
        function = self.problem.function_name
        return entry | {"function": function, "attributes": self.problem.attributes(), "summary": str(self.problem)}


@dataclass
class Report:
    """What became of a model's attention.

    Attributes:
        found: every attention, in the order of the graph.
    """

    found: list[Found] = field(default_factory=list)

    @property
    def replaced(self) -> list[Found]:
        """Those that the plugin's node replaced."""
        return [entry for entry in self.found if entry.replaced]

    @property
    def left_alone(self) -> list[Found]:
        """Those that are as they were, each with its reason."""
        return [entry for entry in self.found if not entry.replaced]

    @property
    def functions(self) -> list[str]:
        """The functions that a library must hold for the model, each once."""
        names = {entry.problem.function_name for entry in self.found if entry.problem is not None}
        return sorted(names)

    def missing(self, held: Collection[str]) -> list[str]:
        """Those of :attr:`functions` that a library does not hold."""
        return [name for name in self.functions if name not in held]

    @property
    def build_command(self) -> str:
        """The command that builds a library with every function that the model needs; empty if it needs none."""
        problems = [entry.problem for entry in self.found if entry.problem is not None]
        if not problems:
            return ""
        dtypes = " ".join(sorted({problem.dtype for problem in problems}))
        sizes = " ".join(map(str, sorted({problem.padded_size for problem in problems})))
        biased = {"--kernels biased" in problem.instance.build_options() for problem in problems}
        kernels = {(True,): "--kernels biased ", (False, True): f"--kernels {' '.join(DEFAULT)} biased "}
        return f"pyfmha build {kernels.get(tuple(sorted(biased)), '')}--dtype {dtypes} --head-size {sizes}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "found": len(self.found),
            "replaced": len(self.replaced),
            "functions": self.functions,
            "build": self.build_command,
            "attention": [entry.as_dict() for entry in self.found],
        }
