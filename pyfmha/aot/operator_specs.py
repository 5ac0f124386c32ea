"""What to compile for operators: the kernels that their launches name, for every type, as functions of a library."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyfmha.aot.absent_tensors import launches_without
from pyfmha.aot.cubin import Compiler, Parameters
from pyfmha.aot.operator_limits import check_room
from pyfmha.aot.operator_types import check_pointer, type_choices
from pyfmha.errors import SpecError
from pyfmha.operators.description import Config, Launch, Operator
from pyfmha.operators.elements import element_of
from pyfmha.operators.expressions import Scope
from pyfmha.operators.names import full_name
from pyfmha.operators.program import NULL, LaunchProgram, Program, Source, program_of
from pyfmha.operators.reading import OF_GRIDS
from pyfmha.operators.trials import check_absent
from pyfmha.spec.abi import ctype
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.constants import Constant, to_data
from pyfmha.spec.kernel import Argument, KernelSpec

_SCALARS = {"int": "i32", "bool": "i32", "float": "fp32"}


def load_operators(compiler: Compiler, path: Path) -> list[Operator]:
    """The operators that a Python file describes, ready to be compiled: arguments in the order of their kernels.

    Raises:
        KernelSourceError: the file is missing, raises, or describes no operator.
        SpecError: a description contradicts itself or its kernel.
    """
    found = [Operator.from_json(data).of(str(path)) for data in compiler.operators(path)]
    ordered = [_ordered(compiler, operator) for operator in found]
    for operator in ordered:
        check_absent(operator)
        _check_written(program_of(operator))
    return ordered


def _check_written(program: Program) -> None:
    """Refuse outputs that no kernel is given: they would stay unwritten."""
    sources = [source for launch in program.launches for _, source in launch.arguments]
    given = {name for source in sources if isinstance(source, Source) for _, name, _ in source.cases}
    for tensor in program.outputs:
        if tensor.name not in given:
            raise SpecError(
                f"{program.operator.name}: output {tensor.name} is given to no launch, so nothing writes it; name it in"
                " arguments={...} (nothing is computed in place)"
            )


def _ordered(compiler: Compiler, operator: Operator) -> Operator:
    program = program_of(operator)
    known = {*program.early_types, *program.axes, *dict(operator.define)} - set(program.types)
    launches = []
    for launch, found in _described(compiler, operator):
        if found is not None:
            launch = _named_questions(tuned_launch(compiler, operator, launch, found), found)
            names = [name for name in _run_time(launch, found) if name in dict(launch.arguments)]
            # What the grid reads besides the kernel's own: the operator's.
            read = [name for name in _words(launch.grid) if name in known and name not in found.names]
            given = {**{name: name for name in read}, **dict(launch.arguments)}
            others = [name for name in given if name not in names]
            launch = replace(launch, arguments=[(name, given[name]) for name in (*names, *others)])
        launches.append(launch)
    return replace(operator, launches=launches)


def _described(compiler: Compiler, operator: Operator) -> Iterator[tuple[Launch, Parameters | None]]:
    """The launches, several for one whose kernel asks whether tensors are there; each with its kernel's parameters."""
    for launch in operator.launches:
        found = compiler.describe(Path(operator.source), launch.kernel) if launch.kernel else None
        for one in [launch] if found is None else launches_without(operator, launch, found):
            yield one, found


def tuned_launch(compiler: Compiler, operator: Operator, launch: Launch, found: Parameters) -> Launch:
    """A launch with the configurations of its kernel's autotuner, if it has none itself, and what heuristics tell.

    Raises:
        SpecError: a configuration has what a launch of an operator has not.
    """
    missing = _constants(launch, found) - set(dict(launch.constants)) - set(found.defaults)
    set_by_tuner = {name for config in found.configs for name in config}
    if launch.configs or not missing & {*set_by_tuner, *found.heuristics}:
        return launch
    what = f"{operator.name}: launch of {launch.kernel}"
    given = {name: {"value": to_data(value)} for name, value in launch.constants}
    configs = []
    for index in range(len(found.configs)) if missing & set_by_tuner else [None]:
        try:
            settled = compiler.settle(Path(operator.source), launch.kernel, ARCHS["sm_80"], index, given)
        except SpecError as error:
            raise SpecError(f"{what}: {error}; give constants={{...}} or configs=[...] for all that it sets") from None
        options = {name: value for name, value in settled.options.items() if (name, value) != ("num_ctas", 1)}
        if settled.notes or "num_ctas" in options:
            why = "; ".join(settled.notes) or "its autotuner sets num_ctas, which an operator has not"
            raise SpecError(f"{what}: {why}; or give configs=[...] yourself")
        configs.append(Config(settled.constants, **options))
    return replace(launch, configs=configs)


class _Questions(ast.NodeTransformer):
    """Puts names for what a grid's own language has not: ``sizes[0]``, ``numel(Y)``."""

    def __init__(self, taken: set[str]) -> None:
        self.taken, self.named = taken, dict[str, str]()

    def visit(self, node: ast.AST) -> Any:
        asked = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OF_GRIDS
        if not asked and not isinstance(node, ast.Subscript):
            return super().visit(node)
        text = ast.unparse(node)
        if text not in self.named:
            name = re.sub(r"\W+", "_", text).strip("_")
            while name in self.taken:
                name += "_"
            self.named[text] = name
            self.taken.add(name)
        return ast.Name(self.named[text])


def _named_questions(launch: Launch, found: Parameters) -> Launch:
    """A launch whose grid reads names alone: elements of lists and answers about tensors become arguments."""
    try:
        tree = ast.parse(launch.grid.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return launch  # refused where the grid is read
    questions = _Questions({*found.names, *dict(launch.arguments), *_words(launch.grid)})
    grid = ast.unparse(questions.visit(tree))
    if not questions.named:
        return launch
    grid = grid[1:-1] if isinstance(tree.body, ast.Tuple) else grid
    given = [(name, text) for text, name in questions.named.items()]
    wide = [(name, "i64") for name, _ in given]
    return replace(launch, grid=grid, arguments=[*launch.arguments, *given], scalars=[*launch.scalars, *wide])


def _words(grid: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"[^\W\d]\w*", grid)))


def _run_time(launch: Launch, found: Parameters) -> list[str]:
    return [name for name in found.names if name not in _constants(launch, found)]


def _constants(launch: Launch, found: Parameters) -> set[str]:
    configured = {name for config in launch.configs for name, _ in config.constants}
    return {*found.constexprs, *dict(launch.constants), *configured}


def check_together(operators: Sequence[Operator]) -> None:
    """Refuse operators of one library whose functions have one name: one would run the kernels of the other.

    Raises:
        SpecError: naming both, and the function.
    """
    compiled: dict[str, str] = {}
    for operator in operators:
        program = program_of(operator)
        said = full_name(operator)
        for launch in program.launches:
            for types in type_choices(program) if launch.launch.kernel else ():
                name = launch.function.render(Scope(types))
                other = compiled.setdefault(name, said)
                if other != said:
                    raise SpecError(
                        f"{other} and {said} would both compile {name}: of names, functions have letters in lower case,"
                        " digits and underscores; rename one, or build it into a folder of its own"
                    )


def operator_specs(compiler: Compiler, operator: Operator) -> list[KernelSpec]:
    """The specs of an operator's own kernels: of each a variant for aligned tensors and a generic one.

    Args:
        compiler: running compiler processes.
        operator: as :func:`load_operators` gives it.

    Raises:
        KernelSourceError: a kernel cannot be had.
        SpecError: an argument has no source, a constant no value, or a launch names what its kernel has not.
    """
    program = program_of(operator)
    check_room(program)
    specs: list[KernelSpec] = []
    for launch in program.launches:
        if launch.launch.kernel:
            found = compiler.describe(Path(operator.source), launch.launch.kernel)
            _check_names(operator, launch.launch, found)
            for types in type_choices(program):
                try:
                    specs += _specs(program, launch, found, types)
                except SpecError as error:
                    if str(error).startswith(f"{operator.name}: "):
                        raise
                    raise SpecError(f"{operator.name}: launch of {launch.launch.kernel}: {error}") from None
    return list({spec.variant: spec for spec in specs}.values())


def _check_names(operator: Operator, launch: Launch, found: Parameters) -> None:
    what = f"{operator.name}: launch of {launch.kernel}"
    given, constants = [name for name, _ in launch.arguments], _constants(launch, found)
    run_time = [name for name in found.names if name not in constants]
    missing = [name for name in run_time if name not in given]
    if missing:
        raise SpecError(f"{what}: argument {', '.join(missing)} of the kernel has no source; give arguments={{...}}")
    of_grid = _grid_arguments(launch, found)
    named = dict.fromkeys((*given, *sorted(constants)))
    unknown = [name for name in named if name not in (*found.names, *of_grid)]
    if unknown:
        raise SpecError(f"{what}: the kernel has no parameter {', '.join(unknown)}; it has {', '.join(found.names)}")
    hinted = [name for name in launch.hints if name in of_grid]
    if hinted:
        raise SpecError(f"{what}: hints name {', '.join(hinted)}, which the grid alone reads")
    both = sorted(set(given) & constants)
    if both:
        raise SpecError(
            f"{what}: {', '.join(both)} is a constant of the kernel; give it in constants, not in arguments"
        )
    if not launch.grid:
        raise SpecError(f"{what}: there is no grid")


def _grid_arguments(launch: Launch, found: Parameters) -> tuple[str, ...]:
    """The arguments that the grid reads and the kernel does not take."""
    read = _words(launch.grid)
    return tuple(name for name, _ in launch.arguments if name not in found.names and name in read)


def _specs(
    program: Program, launch: LaunchProgram, found: Parameters, types: Mapping[str, str]
) -> Iterator[KernelSpec]:
    operator = program.operator
    name = launch.function.render(Scope(types))
    arguments = tuple(_argument(program, launch, argument, types) for argument in launch.arguments)
    for config in launch.launch.configs or (Config(),):
        spec = KernelSpec(
            source=Path(operator.source),
            kernel=launch.launch.kernel,
            name=name,
            arguments=arguments,
            constants=_values(operator, launch.launch, found, config),
            grid=launch.launch.grid,
            grid_arguments=_grid_arguments(launch.launch, found),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.maxnreg,
            nullable=tuple(name for name, source in launch.arguments if _may_be_null(program, source)),
        )
        yield spec
        yield spec.generic()


def _may_be_null(program: Program, source: object) -> bool:
    """Whether a pointer may be of a tensor that is not there, or of the workspace, of which there may be no bytes.

    Where there are some, the plugins look for an address themselves.
    """
    if not isinstance(source, Source):
        return False
    optional = {tensor.name for tensor in (*program.inputs, *program.outputs) if tensor.when is not None}
    optional |= {name for name, _, _ in program.workspace}
    return any(name == NULL or name in optional for _, name, _ in source.cases)


def _values(operator: Operator, launch: Launch, found: Parameters, config: Config) -> tuple[tuple[str, Constant], ...]:
    """The kernel's constants: a configuration's, else the launch's, else the kernel's own defaults."""
    values: dict[str, Constant] = {**found.defaults, **dict(launch.constants), **dict(config.constants)}
    names = _constants(launch, found)
    missing = sorted(names - set(values))
    if missing:
        raise SpecError(
            f"{operator.name}: launch of {launch.kernel}: constant {', '.join(missing)} has no value;"
            " give constants={...}"
        )
    return tuple((name, values[name]) for name in found.names if name in names)


def _argument(
    program: Program, launch: LaunchProgram, argument: tuple[str, object], types: Mapping[str, str]
) -> Argument:
    name, source = argument
    given = dict(launch.launch.scalars).get(name)
    if isinstance(source, Source):
        if given:
            check_pointer(program.operator, launch, name, source, given, types)
        return Argument(name, given or f"*{element_of(program, launch, name, source, types)}", 16)
    kind = given or _SCALARS.get(getattr(source, "type", ""), "")
    what = f"{program.operator.name}: launch of {launch.launch.kernel}, argument {name}"
    if not kind:
        raise SpecError(f"{what}: a kernel takes no {getattr(source, 'type', 'such value')}")
    if ctype(kind).kind == "pointer":
        raise SpecError(f"{what}: it is a pointer ({kind}), and its source is a number")
    if ctype(kind).kind == "integer" and getattr(source, "type", "") == "float":
        raise SpecError(f"{what}: it is {kind}, and its source is a float")
    return Argument(name, kind, 16 if name in launch.launch.hints and ctype(kind).kind == "integer" else None)
