"""An operator as a layer of a TensorRT network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.attributes import checked
from pyfmha.operators.description import Operator
from pyfmha.operators.forms import TensorForm
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import program_of
from pyfmha.runtime.library import Library
from pyfmha.trt.creator import register
from pyfmha.trt.failures import collect_failures
from pyfmha.trt.fields import creation_fields
from pyfmha.trt.modules import find_module, module_of
from pyfmha.trt.protocols import AnyTensor, INetworkDefinition, TensorRT

Tensors = dict[str, Any]
"""``ITensor`` by name."""


def add_operator(
    network: INetworkDefinition,
    operator: Operator | str,
    *inputs: AnyTensor,
    name: str | None = None,
    namespace: str | None = None,
    library: Library | Path | str | None = None,
    trt_module: TensorRT | None = None,
    **attributes: Any,
) -> tuple[AnyTensor, ...]:
    """Add an operator of a library to a network. Registers its plugin first, if need be.

    Args:
        network: an ``INetworkDefinition`` of TensorRT 10.x or 11.x.
        operator: its description, or its name in the library.
        inputs: ``ITensor``, in the order of the description's inputs, without those that the attributes leave out;
            those whose values are read as sizes come last.
        name: of the layer, which also names it in the engine and in messages.
        namespace, library: as :func:`pyfmha.trt.register`.
        trt_module: by default the module that the network is of.
        attributes: of the operator, by name.

    Returns:
        Its outputs, each an ``ITensor``.

    Raises:
        PluginError: an attribute is not served, the tensors do not fit, or TensorRT refused the layer.
        LibraryError: the library is missing or cannot be used.
    """
    trt = module_with_plugins(network, trt_module)
    creator = register(trt, namespace=namespace, library=library, operator=operator)
    program = program_of(creator.operator)
    own = {"name": name, "namespace": namespace, "library": library, "trt_module": trt_module}
    both = [word for word, value in own.items() if value is not None and word in program.attributes]
    if both:
        raise PluginError(
            f"{creator.operator.name} has an attribute {', '.join(both)}, which add_operator takes for itself; add the"
            " layer with pyfmha.trt.network.add_layer"
        )
    given = checked(program, attributes)
    instance = Instance(program, given)
    forms = instance.forms()
    names = [*(form.name for form in forms.inputs), *(shape for shape, _ in forms.shapes)]
    if len(inputs) != len(names):
        raise PluginError(
            f"{creator.operator.name} is given {len(inputs)} inputs; it takes {', '.join(names) or 'none'}"
        )
    _, outputs = add_layer(trt, network, creator, given, dict(zip(names, inputs, strict=True)), name)
    return tuple(outputs)


def add_layer(
    trt: Any,
    network: Any,
    creator: Any,
    attributes: Mapping[str, Any],
    tensors: Tensors,
    name: str | None = None,
) -> tuple[Any, list[Any]]:
    """Add a plugin to a network.

    Args:
        trt: the network's module.
        network: anything with TensorRT's ``add_plugin_v3``.
        creator: as :func:`pyfmha.trt.register` returns it.
        attributes: of the operator.
        tensors: its inputs, in any order.
        name: of the layer; None leaves it as it is.

    Returns:
        The layer and its outputs.

    Raises:
        PluginError: the tensors do not fit, or TensorRT refused the layer.
    """
    program = program_of(creator.operator)
    fields = creation_fields(trt, program, attributes)
    forms = Instance(program, attributes).forms()
    inputs = [tensors[form.name] for form in forms.inputs]
    shapes = [tensors[shape] for shape, _ in forms.shapes]
    said = name or creator.name
    with collect_failures() as failures:
        plugin = creator.create_plugin(said, fields.collection, trt.TensorRTPhase.BUILD)
        layer = network.add_plugin_v3(inputs, shapes, plugin)
        outputs = [] if layer is None else [layer.get_output(index) for index in range(len(forms.outputs))]
        fits = bool(outputs) and all(map(_fits, outputs, forms.outputs))
    if failures:
        raise failures[-1].error
    if not fits:
        raise PluginError(f"{trt.__name__} refused to add {said!r}; its log says why")
    if name is not None:
        layer.name = name
    return layer, outputs


def _fits(output: Any, form: TensorForm) -> bool:
    """Whether TensorRT has a shape for an output. It asks the plugin now that it is asked itself, and shows a failure
    by what it answers: there is no shape (a RuntimeError), or one of -1 dimensions (up to 11.1, a ValueError)."""
    try:
        return output is not None and len(output.shape) == len(form.axes)
    except (RuntimeError, ValueError):
        return False


def module_with_plugins(network: Any, trt_module: Any) -> Any:
    """The TensorRT module of a network.

    Raises:
        PluginError: it has no plugins in networks.
    """
    trt = find_module(trt_module if trt_module is not None else module_of(network))
    if not hasattr(network, "add_plugin_v3"):
        raise PluginError(
            f"{trt.__name__} {trt.__version__} has no plugins in networks; build the engine with tensorrt"
        )
    return trt
