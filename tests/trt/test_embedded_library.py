"""Engines that carry a library: version-compatible ones alone, which a session runs when it is told to trust."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt_double.full import make_full
from trt_double.full.gpu import Gpu

from pyfmha.errors import EngineError, LibraryError
from pyfmha.trt import add_attention
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.engine import build_plan
from pyfmha.trt.session import Session

pytest_plugins = ["plugin_host.operators", "trt_double.fixtures", "trt_double.full.fixtures"]


def attention(trt: Any) -> Any:
    def define(network: Any) -> None:
        q, k, v = (network.add_input(name, trt.DataType.HALF, (1, 2, 24, 32)) for name in "QKV")
        out = add_attention(network, q, k, v, causal=True)
        out.name = "Out"
        network.mark_output(out)

    return define


def test_a_session_runs_what_it_is_told_to_trust(trt11: Any, path: Path, gpu: Gpu) -> None:
    plan = build_plan(trt11, attention(trt11), {}, version_compatible=True, embedded=path).plan
    inputs = dict.fromkeys("QKV", np.ones((1, 2, 24, 32), np.float16))
    with pytest.raises(EngineError, match=r"it carries a library; .*Session\(\.\.\., trust_library=True\)"):
        Session(plan, trt_module=trt11)
    with Session(plan, trt_module=trt11, trust_library=True) as session:
        out = session.run(inputs)["Out"]
    assert np.allclose(out.astype(np.float32), 1.0, atol=1e-2)
    plain = build_plan(trt11, attention(trt11), {}, version_compatible=True).plan
    with Session(plain, trt_module=trt11) as session:
        assert np.array_equal(session.run(inputs)["Out"], out)


def test_trust_in_what_is_not_there(trt11: Any, gpu: Gpu) -> None:
    """With trust the engine brings the plugin; where it does not, in a process that has none, the error says so."""
    plain = build_plan(trt11, attention(trt11), {}, version_compatible=True).plan
    fresh = make_full("trt_fresh", trt11.__version__)
    try:
        with pytest.raises(EngineError, match=r"Cannot find plugin.*leave out trust_library=True"):
            Session(plain, trt_module=fresh, trust_library=True)
        with Session(plain, trt_module=fresh) as session:
            assert [info.name for info in session.outputs] == ["Out"]
    finally:
        del sys.modules["trt_fresh"]


def test_what_cannot_be_carried(trt11: Any, path: Path, small_library_path: Path, tmp_path: Path, gpu: Gpu) -> None:
    with pytest.raises(EngineError, match="has no plugins for the engine to carry"):
        build_plan(trt11, attention(trt11), {}, version_compatible=True, embedded=small_library_path)
    with pytest.raises(LibraryError, match="no library at"):
        build_plan(trt11, attention(trt11), {}, version_compatible=True, embedded=tmp_path / "libnone.so")
    (tmp_path / "text.so").write_text("getCreators")
    with pytest.raises(LibraryError, match=r"text\.so cannot be loaded"):
        build_plan(trt11, attention(trt11), {}, version_compatible=True, embedded=tmp_path / "text.so")
    with pytest.raises(EngineError, match="give version_compatible=True too"):
        build_plan(trt11, attention(trt11), {}, embedded=path)
    config = EngineConfig(num_heads=2, head_size=32, max_batch_size=2, max_seq_len=40, causal=True)
    with pytest.raises(EngineError, match="has no plugin of its own to carry; build it again: pyfmha build"):
        build_engine(config, trt_module=trt11, embed_library=True)
