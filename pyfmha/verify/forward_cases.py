"""What ``pyfmha verify`` computes with the plain functions: each feature and edge of ``fmha_fwd_*``, of decoding, and
of the first kernel."""

from dataclasses import replace
from typing import Any

from pyfmha.verify.cases import Case


def forward_cases(dtype: str, padded: int) -> list[Case]:
    """For one ``fmha_fwd_*``: features and edges on aligned tensors, then on such as only the generic variant takes."""
    plain = Case("", dtype, padded)
    grouped = {"heads": 6, "kv_heads": 2}
    ragged: dict[str, Any] = {**grouped, "q_len": 80, "kv_len": 90, "batch": 1}
    # Rows of no sequence, sequences of one query, of no keys, of one tile and a row more.
    long: dict[str, Any] = {
        **{**ragged, "q_len": 460, "kv_len": 700, "heads": 2},
        **{"cu_q": (7, 8, 8, 72, 137, 150, 420), "cu_kv": (0, 200, 260, 260, 333, 400, 691)},
    }
    alone: dict[str, Any] = {"batch": 1, "heads": 1, "kv_heads": 1}
    three_quarters = padded * 3 // 4
    one: dict[str, Any] = {"q_len": 1, "kv_len": 700, "heads": 8, "kv_heads": 2}
    features: list[tuple[str, dict[str, Any]]] = [
        ("seq 1", {"q_len": 1, "kv_len": 1}),
        ("seq 17 causal", {"q_len": 17, "kv_len": 17, "right": 0}),
        ("seq 129", {"q_len": 129, "kv_len": 129, "batch": 1}),
        ("seq 200 causal", {"q_len": 200, "kv_len": 200, "batch": 1, "right": 0}),
        ("seq 450 causal", {"q_len": 450, "kv_len": 450, "batch": 1, "heads": 3, "kv_heads": 1, "right": 0}),
        ("seq 1030 causal", {"q_len": 1030, "kv_len": 1030, "batch": 1, "heads": 1, "kv_heads": 1, "right": 0}),
        ("seq 600", {"q_len": 600, "kv_len": 600, "batch": 1, "heads": 1, "kv_heads": 1}),
        ("Sq 4200, Skv 300, causal", {"q_len": 4200, "kv_len": 300, "batch": 1, "heads": 3, "kv_heads": 1, "right": 0}),
        ("Sq 2070, 32 heads, causal", {**alone, "q_len": 2070, "kv_len": 90, "heads": 32, "right": 0}),
        ("Sq 33, Skv 150", {"q_len": 33, "kv_len": 150}),
        ("Sq 150, Skv 33, causal", {"q_len": 150, "kv_len": 33, "right": 0}),
        ("Sq 33, Skv 150, bottom right", {"q_len": 33, "kv_len": 150, "right": 0, "bottom_right": True}),
        ("rows without keys", {"q_len": 150, "kv_len": 33, "right": 0, "bottom_right": True}),
        ("no keys", {"kv_len": 0}),
        ("heads 6/2, causal", {**grouped, "right": 0}),
        ("heads 4/1, bshd", {"heads": 4, "kv_heads": 1, "layout": "bshd"}),
        ("window 16, 0", {"q_len": 140, "kv_len": 140, "batch": 1, "left": 16, "right": 0}),
        ("window 5, 7", {"left": 5, "right": 7}),
        ("window 0, 0", {"left": 0, "right": 0}),
        ("window past the keys", {"q_len": 120, "kv_len": 20, "left": 3, "right": 3}),
        ("soft cap", {"softcap": 2.0, "right": 0}),
        ("soft cap, window, heads 6/2", {**grouped, "softcap": 30.0, "left": 9, "right": 2}),
        ("soft cap, several tiles", {"q_len": 300, "kv_len": 330, "batch": 1, "softcap": 50.0, "right": 0}),
        ("soft cap, not causal", {"softcap": 20.0, "layout": "bshd"}),
        ("soft cap, Sq 2060", {**alone, "q_len": 2060, "kv_len": 90, "softcap": 10.0, "right": 0}),
        ("soft cap, Sq 1030, not causal", {**alone, "q_len": 1030, "kv_len": 200, "softcap": 50.0}),
        ("small soft cap, Sq 1030, not causal", {**alone, "q_len": 1030, "kv_len": 200, "softcap": 10.0}),
        ("soft cap of 50, Sq 2060, causal", {**alone, "q_len": 2060, "kv_len": 200, "softcap": 50.0, "right": 0}),
        ("soft cap, Sq 4200, causal", {**alone, "q_len": 4200, "kv_len": 300, "softcap": 50.0, "right": 0}),
        ("soft cap, lengths", {"softcap": 5.0, "q_lengths": (40, 0), "kv_lengths": (70, 3)}),
        ("lengths", {"q_lengths": (40, 0), "kv_lengths": (70, 3)}),
        ("lengths beyond", {"q_lengths": (1000, -5), "kv_lengths": (-1, 2**31 - 1), "right": 0}),
        ("lengths, Sq 600", {"q_len": 600, "kv_len": 300, "kv_lengths": (170, 0)}),
        ("lengths, Sq 1030, causal", {**alone, "q_len": 1030, "kv_len": 300, "kv_lengths": (170,), "right": 0}),
        ("lengths, Sq 4200, causal", {**alone, "q_len": 4200, "kv_len": 300, "kv_lengths": (170,), "right": 0}),
        ("lengths, Sq 8200", {**alone, "q_len": 8200, "kv_len": 300, "kv_lengths": (170,)}),
        ("ragged", {**ragged, "cu_q": (0, 5, 5, 80), "cu_kv": (0, 40, 41, 90), "right": 0}),
        ("ragged, decreasing", {**ragged, "cu_q": (3, 50, 20, 999), "cu_kv": (-4, 60, 10, 85)}),
        ("ragged, 40 sequences", {**ragged, **_sequences(40), "right": 0, "bottom_right": True}),
        ("ragged, several tiles", {**long, "right": 0}),
        ("ragged, window 40, 9", {**long, "left": 40, "right": 9, "heads": 4, "kv_heads": 1}),
        ("ragged, bottom right", {**long, "right": 0, "bottom_right": True, "heads": 2}),
        ("ragged, soft cap", {**long, "right": 0, "softcap": 3.0}),
        (
            "ragged, few long sequences",
            {
                **alone,
                "q_len": 1500,
                "kv_len": 300,
                "heads": 2,
                "cu_q": (0, 650, 1470),
                "cu_kv": (0, 90, 300),
                "right": 0,
            },
        ),
        ("without log-sum-exp", {"lse": False, "right": 0}),
        ("largest inputs", {"largest": True}),
        ("largest inputs, soft cap", {"largest": True, "softcap": 5.0}),
        (f"head size {padded - 8}", {"head_size": padded - 8, "right": 0}),
        (f"head size {three_quarters}", {"head_size": three_quarters, "q_len": 140, "batch": 1, "layout": "bshd"}),
        (f"head size {three_quarters}, causal", {"head_size": three_quarters, "right": 0}),
        (
            f"head size {three_quarters}, Sq 1030, causal",
            {**alone, "head_size": three_quarters, "q_len": 1030, "kv_len": 300, "right": 0},
        ),
        ("Sq 8200", {**alone, "q_len": 8200, "kv_len": 300}),
        (
            f"head size {three_quarters}, Sq 1550, causal",
            {**alone, "head_size": three_quarters, "q_len": 1550, "kv_len": 300, "right": 0, "bottom_right": True},
        ),
        (
            f"head size {three_quarters}, 16 heads, Sq 1540",
            {"head_size": three_quarters, "q_len": 1540, "batch": 1, "heads": 16, "kv_heads": 1},
        ),
        (
            f"head size {three_quarters}, Sq 8200, causal",
            {**alone, "head_size": three_quarters, "q_len": 8200, "kv_len": 90, "right": 0},
        ),
        *(
            (f"head size {three_quarters}, lengths{', causal' * (right == 0)}", {**few, "right": right})
            for few in [{"head_size": three_quarters, "q_len": 140, "kv_lengths": (70, 3)}]
            for right in (-1, 0)
        ),
        ("one query, 2600 keys", {**one, "kv_len": 2600, "batch": 1}),
        ("one query, bshd, heads 18/2", {**one, "heads": 18, "layout": "bshd"}),
        ("one query, lengths", {**one, "kv_lengths": (77, 0), "right": 0, "bottom_right": True}),
        ("one query, window", {**one, "left": 130, "right": 0, "bottom_right": True}),
        ("one query, batch 20", {**one, "kv_len": 90, "batch": 20}),
        ("one query, batch 70", {**one, "kv_len": 90, "batch": 70}),
        ("one query, largest inputs", {**one, "largest": True}),
        *([(f"channels of sizes 2**{s:.0f}", {"spread": s}) for s in (2.0, 8.0)] if dtype == "fp32" else []),
    ]
    aligned = [replace(plain, name=name, **changes) for name, changes in features]
    picked = {
        "seq 1", "seq 200 causal", "Sq 33, Skv 150", "rows without keys", "heads 6/2, causal", "window 5, 7",
        "soft cap, window, heads 6/2", "lengths beyond", "ragged, decreasing", "without log-sum-exp", "largest inputs",
    }  # fmt: skip
    misaligned = [replace(c, name=f"{c.name}, misaligned", shift=1) for c in aligned if c.name in picked]
    return [
        *aligned,
        *misaligned,
        replace(plain, name="odd strides", gap=1, right=0),
        replace(plain, name="odd strides, bshd, soft cap", gap=3, layout="bshd", softcap=5.0),
        replace(plain, name=f"head size {padded - 3}", head_size=padded - 3, right=0),
        # What lies between rows must stay, also where rows begin at multiples of 16 bytes, as TMA wants them.
        replace(plain, name=f"head size {padded - 4} in rows of {padded}", head_size=padded - 4, gap=4, right=0),
    ]


def _sequences(count: int) -> dict[str, tuple[int, ...]]:
    """As many short ones in a row, of which some have no queries, or no keys."""
    return {
        "cu_q": tuple(i // 5 * 8 + 2 * min(i % 5, 4) for i in range(count + 1)),
        "cu_kv": tuple(i // 3 * 6 for i in range(count + 1)),
    }


def decode_cases(dtype: str, padded: int) -> list[Case]:
    """For one pair of ``fmha_split_*`` and ``fmha_combine_*``."""
    plain = Case("", dtype, padded, heads=8, kv_heads=2, q_len=1, kv_len=600, splits=5)
    few: dict[str, Any] = {"kv_len": 60}
    features: list[tuple[str, dict[str, Any]]] = [
        ("one query", {}),
        ("one split", {"splits": 1}),
        ("one split, 400 key heads", {**few, "batch": 200, "splits": 1}),
        ("400 key heads", {**few, "batch": 200, "splits": 2}),
        ("more splits than keys", {"kv_len": 3, "splits": 7}),
        ("5 queries, bottom right", {"q_len": 5, "right": 0, "bottom_right": True, "layout": "bshd"}),
        ("17 queries of 3 heads", {"q_len": 17, "heads": 3, "kv_heads": 1, "kv_len": 130}),
        ("window", {"q_len": 2, "left": 100, "right": 0, "bottom_right": True}),
        ("soft cap", {**few, "softcap": 2.0}),
        ("lengths", {**few, "q_len": 2, "q_lengths": (1, 2), "kv_lengths": (0, 37)}),
        ("no keys", {"kv_len": 0}),
        ("without log-sum-exp", {**few, "lse": False}),
        ("largest inputs", {**few, "largest": True}),
        (f"head size {padded - 8}", {**few, "head_size": padded - 8}),
        (f"head size {padded - 3}", {**few, "head_size": padded - 3}),
        ("odd strides", {**few, "gap": 1}),
        ("400 key heads, lengths", {**few, "batch": 200, "splits": 2, "kv_lengths": (0, 37) * 100}),
    ]
    cases = [replace(plain, name=f"decoding, {name}", **changes) for name, changes in features]
    return [
        *cases,
        *(replace(case, name=f"{case.name}, misaligned", shift=1) for case in cases[:10] if case.batch < 200),
    ]


def first_cases(dtype: str, head_size: int, causal: bool, precision: str) -> list[Case]:
    """For one function of the first kernel, ``fmha_d*``."""
    plain = Case(
        "", dtype, head_size, heads=3, kv_heads=3, right=0 if causal else -1, lse=False,
        limit_of="tf32" if precision == "tf32" else "",
    )  # fmt: skip
    cases = [replace(plain, name=f"seq {seq}", q_len=seq, kv_len=seq) for seq in (1, 17, 128, 129, 200)]
    if precision != "tf32":  # which rounds the largest float32 to infinity
        cases.append(replace(plain, name="largest inputs", largest=True))
    return [*cases, *(replace(case, name=f"{case.name}, misaligned", shift=1) for case in cases)]
