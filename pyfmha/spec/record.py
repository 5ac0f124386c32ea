"""A spec as JSON-ready data and back, for the files that say what something was compiled from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyfmha.spec.descriptors import Descriptor
from pyfmha.spec.kernel import Argument, JitFunction, KernelSpec, Tuning


def spec_to_data(spec: KernelSpec) -> dict[str, Any]:
    """Everything about a spec; of its source only the file's name, so that no path of a machine is in it."""
    return {
        "source": spec.source.name,
        "kernel": spec.kernel,
        "name": spec.name,
        "arguments": [[a.name, a.type, a.hint] for a in spec.arguments],
        "constants": [list(constant) for constant in spec.constants],
        "grid": spec.grid,
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "algorithm_name": spec.algorithm_name,
        "tunings": [asdict(tuning) for tuning in spec.tunings],
        "requires": list(spec.requires),
        "archs": list(spec.archs),
        "maxnreg": spec.maxnreg,
        "descriptors": [asdict(descriptor) for descriptor in spec.descriptors],
        "programmatic_dependent_launch": spec.programmatic_dependent_launch,
        "cluster": spec.cluster,
        "debug": spec.debug,
        "enable_fp_fusion": spec.enable_fp_fusion,
        "nullable": list(spec.nullable),
        "functions": [[f.parameter, f.source.name, f.attribute] for f in spec.functions],
        "packed": None if spec.packed is None else [spec.packed[0], list(spec.packed[1])],
    }


def spec_from_data(data: dict[str, Any]) -> KernelSpec:
    """The spec from :func:`spec_to_data`, or from that of an earlier version, which had fewer settings.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the data is damaged, or of a later version.
    """
    fields = dict(data)
    fields["source"] = Path(str(fields["source"]))
    fields["arguments"] = tuple(Argument(*argument) for argument in fields["arguments"])
    fields["constants"] = tuple((name, value) for name, value in fields["constants"])
    fields["tunings"] = tuple(
        Tuning(**{**tuning, "constants": tuple((name, value) for name, value in tuning["constants"])})
        for tuning in fields["tunings"]
    )
    for name in ("requires", "archs", "nullable"):
        fields[name] = tuple(fields.get(name, ()))
    fields["functions"] = tuple(JitFunction(p, Path(file), name) for p, file, name in fields.get("functions", ()))
    packed = fields.get("packed")
    fields["packed"] = None if packed is None else (packed[0], tuple(packed[1]))
    fields["descriptors"] = tuple(map(_descriptor, fields.get("descriptors", ())))
    return KernelSpec(**fields)


def _descriptor(data: dict[str, Any]) -> Descriptor:
    return Descriptor(data["name"], data["base"], *(tuple(data[name]) for name in ("shape", "strides", "block")))
