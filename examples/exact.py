"""Inputs for any engine of build.py, what it should give for them, in float64, and how far it is from that."""

from typing import Any

import numpy as np

from pyfmha.attention.reference import LIMITS, attend, relative_error
from pyfmha.attention.run import to_float, to_storage
from pyfmha.trt.attention.config import EngineConfig
from pyfmha.verify.cases import LSE_LIMIT, lse_error

Arrays = dict[str, Any]


def make_inputs(config: EngineConfig, batch: int, seq: int, kv_seq: int, seed: int) -> Arrays:
    """Random inputs: standard normal, or lengths, of which each sequence has its own; NaN where a length ends.

    Args:
        config: of the engine.
        batch, seq, kv_seq: sequences, and the queries and keys of each; with lengths, at most so many.
        seed: of all that is random.
    """
    lengths = _make_lengths(config, batch, seq, kv_seq, np.random.default_rng([seed, 1]))
    tokens, kv_tokens = (int(lengths[f"cu_seqlens_{x}"][-1]) if config.cu_seqlens else 0 for x in ("q", "kv"))
    sizes = {"batch": batch, "seq": seq, "Sq": seq, "Skv": kv_seq}
    sizes |= {"tokens": tokens, "Q tokens": tokens, "KV tokens": kv_tokens}
    generator = np.random.default_rng(seed)
    inputs: Arrays = {}
    for name, axes in config.axes().items():
        if name in lengths:
            inputs[name] = lengths[name]
        else:
            shape = [sizes[axis] if size is None else size for axis, size in axes]
            inputs[name] = to_storage(generator.standard_normal(shape, np.float32), config.dtype)
    _spoil_padding(config, inputs)
    return inputs


def _make_lengths(config: EngineConfig, batch: int, seq: int, kv_seq: int, generator: np.random.Generator) -> Arrays:
    most = {"q_lengths": seq, "kv_lengths": kv_seq, "cu_seqlens_q": seq, "cu_seqlens_kv": kv_seq}
    made: Arrays = {}
    for name in [name for name in config.axes() if name in most]:
        # A sequence may be empty, but not all of a ragged batch: no profile has tensors without elements.
        lengths = generator.integers(int(config.cu_seqlens), most[name] + 1, batch, dtype=np.int32)
        made[name] = np.append(0, np.cumsum(lengths)).astype(np.int32) if config.cu_seqlens else lengths
    if config.layout == "packed" and config.cu_seqlens:
        made["cu_seqlens_kv"] = made["cu_seqlens_q"]
    return made


def _natural(config: EngineConfig, inputs: Arrays) -> list[Any]:
    """Q, K and V [batch, heads, seq, head size] or [tokens, heads, head size]: views of the inputs."""
    if config.layout == "packed":
        parts = np.split(inputs["QKV"], [config.num_heads, config.num_heads + config.kv_heads], axis=-2)
    else:
        parts = [inputs[name] for name in "QKV"]
    return [_swapped(config, part) for part in parts]


def _swapped(config: EngineConfig, array: Any) -> Any:
    """Between the order of the engine's axes and [batch, heads, seq, head size]; a ragged batch stays as it is."""
    return array.swapaxes(1, 2) if config.layout in ("bshd", "packed") and not config.cu_seqlens else array


def _spoil_padding(config: EngineConfig, inputs: Arrays) -> None:
    """What is past a length must not count."""
    q, k, v = _natural(config, inputs)
    nan = to_storage(np.full(1, np.nan, np.float32), config.dtype)
    for name, tensors in (("q_lengths", (q,)), ("kv_lengths", (k, v))):
        for b, length in enumerate(inputs.get(name, ())):
            for tensor in tensors:
                tensor[b, :, length:] = nan


def exact_outputs(config: EngineConfig, inputs: Arrays) -> Arrays:
    """Out, and Lse if the engine has it, as its outputs are laid out."""
    lengths = {name: array.tolist() for name, array in inputs.items() if name not in ("Q", "K", "V", "QKV")}
    out, lse = attend(
        *(to_float(x, config.dtype) for x in _natural(config, inputs)),
        scale=config.factor,
        softcap=config.softcap,
        window_left=config.window[0],
        window_right=0 if config.causal else config.window[1],
        bottom_right="bottom-right" in (config.causal, config.align),
        **lengths,
    )
    return {"Out": _swapped(config, out)} | ({"Lse": lse} if config.return_lse else {})


def judge(config: EngineConfig, results: Arrays, exact: Arrays) -> list[tuple[str, bool]]:
    """For each output a text, and whether it passed."""
    out, limit = results["Out"], LIMITS[config.dtype]
    error = relative_error(to_float(out, config.dtype), exact["Out"])
    verdicts = [(f"{list(out.shape)} {config.dtype}: relative error {error:.1e} against float64", error, limit)]
    if config.return_lse:
        off = lse_error(results["Lse"], exact["Lse"])
        text = f"log-sum-exp {list(results['Lse'].shape)}: error {off:.1e} of 1 + its size"
        verdicts.append((text, off, LSE_LIMIT))
    return [(f"{text}, limit {most:.0e}: {_verdict(found <= most)}", found <= most) for text, found, most in verdicts]


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"
