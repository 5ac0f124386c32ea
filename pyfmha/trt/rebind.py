"""A plugin's launch with other values for some arguments: for callers who know more of tensors than TensorRT says."""

import dataclasses
import weakref
from collections.abc import Mapping

from pyfmha.errors import PluginError
from pyfmha.operators.plan import Plan, Step
from pyfmha.runtime.library import Library
from pyfmha.trt.launch import Enqueue, bind, check_arguments
from pyfmha.trt.plugin import PluginBehaviour


def rebind(plugin: PluginBehaviour, values: Mapping[str, int]) -> Enqueue:
    """The ``enqueue`` for the shape last prepared, with other values for some arguments.

    It may be called by several threads at a time, and works as long as the plugin lives.

    Args:
        plugin: whose ``on_shape_change`` was called.
        values: by the names of the functions' arguments; what a function does not take is left out.

    Raises:
        PluginError: no shape is prepared, or a value does not fit its argument.
    """
    plan = plugin._plan
    if plan is None:
        raise PluginError("no shape is prepared: on_shape_change was not called on this object, or failed")
    library = plugin.origin.library
    changed = _with_values(library, plan, values)
    steps = [(library[step.function], plugin.tactic.algo_id if step.tuned else 0) for step in changed.steps]
    return bind(steps, changed, weakref.WeakMethod(plugin._enqueue_failed))


def _with_values(library: Library, plan: Plan, values: Mapping[str, int]) -> Plan:
    steps = []
    for step in plan.steps:
        names = [name for name, _ in library[step.function].manifest.arguments]
        arguments = [values.get(name, argument) for name, argument in zip(names, step.arguments, strict=True)]
        steps.append(Step(step.function, tuple(arguments), step.tuned))
        check_arguments(library[step.function], steps[-1].arguments)
    return dataclasses.replace(plan, steps=tuple(steps))
