"""A spec as JSON-ready data and back, for the files that say what something was compiled from."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyfmha.spec.constants import Constant, JitFunction, constants_to_data, from_data
from pyfmha.spec.descriptors import Descriptor
from pyfmha.spec.kernel import Argument, KernelSpec, Tuning


def spec_to_data(spec: KernelSpec) -> dict[str, Any]:
    """Everything about a spec; of its source only the file's name, so that no path of a machine is in it."""
    return {
        "source": spec.source.name,
        "kernel": spec.kernel,
        "name": spec.name,
        "arguments": [[a.name, a.type, a.hint] for a in spec.arguments],
        "constants": constants_to_data(spec.constants),
        "grid": spec.grid,
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "algorithm_name": spec.algorithm_name,
        "tunings": [{**asdict(tuning), "constants": constants_to_data(tuning.constants)} for tuning in spec.tunings],
        "requires": list(spec.requires),
        "archs": list(spec.archs),
        "maxnreg": spec.maxnreg,
        "descriptors": [asdict(descriptor) for descriptor in spec.descriptors],
        "programmatic_dependent_launch": spec.programmatic_dependent_launch,
        "cluster": spec.cluster,
        "num_ctas": spec.num_ctas,
        "tuples": _listed(spec.tuples),
        "workspace": spec.workspace,
        "grid_arguments": list(spec.grid_arguments),
        "debug": spec.debug,
        "enable_fp_fusion": spec.enable_fp_fusion,
        "nullable": list(spec.nullable),
        "functions": [[f.parameter, f.source.name, f.attribute] for f in spec.functions],
    }


def spec_from_data(data: dict[str, Any]) -> KernelSpec:
    """The spec from :func:`spec_to_data`, or from that of an earlier version, which had fewer settings.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the data is damaged, or of a later version.
    """
    fields = dict(data)
    fields["source"] = Path(str(fields["source"]))
    fields["arguments"] = tuple(Argument(*argument) for argument in fields["arguments"])
    fields["constants"] = _constants_from(fields["constants"])
    fields["tunings"] = tuple(
        Tuning(**{**tuning, "constants": _constants_from(tuning["constants"])}) for tuning in fields["tunings"]
    )
    fields["tuples"] = _nested(fields.get("tuples", ()))
    for name in ("requires", "archs", "nullable", "grid_arguments"):
        fields[name] = tuple(fields.get(name, ()))
    fields["functions"] = tuple(JitFunction(p, Path(file), name) for p, file, name in fields.get("functions", ()))
    fields["descriptors"] = tuple(map(_descriptor, fields.get("descriptors", ())))
    return KernelSpec(**fields)


def _constants_from(data: Sequence[Any]) -> tuple[tuple[str, Constant], ...]:
    return tuple((name, from_data(value)) for name, value in data)


def _listed(shape: Any) -> Any:
    return list(map(_listed, shape)) if isinstance(shape, tuple) else shape


def _nested(data: Any) -> Any:
    return tuple(map(_nested, data)) if isinstance(data, list | tuple) else data


def _descriptor(data: dict[str, Any]) -> Descriptor:
    shape, strides, block = (tuple(data[name]) for name in ("shape", "strides", "block"))
    return Descriptor(data["name"], data["base"], shape, strides, block, data.get("parts", 1))
