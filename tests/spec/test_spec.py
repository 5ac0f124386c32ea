"""What to compile: validation, names and the signature notation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyfmha.errors import SpecError
from pyfmha.spec.abi import SCALARS
from pyfmha.spec.c_names import check_function_name, derived_function_name
from pyfmha.spec.constants import Constant, Dtype, FunctionName, from_data, to_data
from pyfmha.spec.kernel import Argument, KernelSpec, Tuning
from pyfmha.spec.signature import parse_signature, split_signature

SPEC = KernelSpec(
    source=Path("kernel.py"),
    kernel="kernel",
    name="function",
    arguments=(Argument("X", "*fp16", 16), Argument("n", "i32")),
    constants=(("BLOCK", 128),),
    grid="cdiv(n, BLOCK)",
)


class TestArgument:
    @pytest.mark.parametrize(
        ("kind", "hint"), [("*fp16", 16), ("i32", 16), ("i32", 8), ("i32", 1), ("u64", 16), ("fp32", None)]
    )
    def test_pointers_and_integers_carry_hints(self, kind: str, hint: int | None) -> None:
        assert Argument("x", kind, hint).hint == hint

    @pytest.mark.parametrize("hint", [0, 2, 4, 32, -16, True])
    def test_other_hints_are_refused_with_those_allowed(self, hint: int) -> None:
        with pytest.raises(SpecError, match=r"hint .* is unknown; use :16 .* or :1"):
            Argument("x", "i32", hint)

    def test_a_pointer_cannot_promise_to_be_one(self) -> None:
        with pytest.raises(SpecError, match=r"x: \*fp16 cannot carry the hint :1; pointers take :16 only"):
            Argument("x", "*fp16", 1)

    def test_a_float_cannot_promise_anything(self) -> None:
        with pytest.raises(SpecError, match="x: fp32 cannot carry the hint :16; floating-point arguments take no hint"):
            Argument("x", "fp32", 16)

    @pytest.mark.parametrize(
        "name", ["register", "stream", "algo_id", "int64_t", "scratch", "half_bits", "pyfmha_fail"]
    )
    def test_a_name_that_c_or_the_generated_code_uses_gets_an_underscore(self, name: str) -> None:
        assert Argument(name, "i32").c_name == f"{name}_"

    def test_other_names_stay_as_they_are(self) -> None:
        assert Argument("seq_len", "i32").c_name == "seq_len"


class TestSpec:
    @pytest.mark.parametrize("warps", [0, 3, 64, -4, True, 1.5])
    def test_a_wrong_number_of_warps_is_refused(self, warps: int) -> None:
        with pytest.raises(SpecError, match=r"num_warps is .*; use 1, 2, 4, 8, 16 or 32"):
            replace(SPEC, num_warps=warps)

    @pytest.mark.parametrize("stages", [0, -1, 17, True])
    def test_a_wrong_number_of_stages_is_refused(self, stages: int) -> None:
        with pytest.raises(SpecError, match=r"num_stages is .*; use 1 to 16"):
            replace(SPEC, num_stages=stages)

    def test_a_kernel_without_run_time_arguments_is_refused(self) -> None:
        with pytest.raises(SpecError, match="takes no run-time argument"):
            replace(SPEC, arguments=(), grid="1")

    def test_an_argument_given_twice_is_refused(self) -> None:
        with pytest.raises(SpecError, match="argument n is given more than once"):
            replace(SPEC, constants=(("n", 1),))

    def test_arguments_that_c_cannot_tell_apart_are_refused(self) -> None:
        with pytest.raises(SpecError, match="two arguments would be called register_ in C"):
            replace(SPEC, arguments=(Argument("register", "i32"), Argument("register_", "i32")), grid="1")

    def test_an_argument_called_as_the_function_is_refused(self) -> None:
        with pytest.raises(SpecError, match=r"an argument has the function's name.*--out-name"):
            replace(SPEC, name="n")

    def test_a_name_outside_ascii_is_refused(self) -> None:
        with pytest.raises(SpecError, match="größe is not an ASCII name"):
            replace(SPEC, arguments=(Argument("größe", "i32"),), grid="1")

    def test_a_wrong_grid_is_refused(self) -> None:
        with pytest.raises(SpecError, match="'m' is no integer argument"):
            replace(SPEC, grid="m")

    @pytest.mark.parametrize("kind", ["*fp16", "fp32"])
    def test_what_is_called_as_a_word_of_grids_must_be_an_integer(self, kind: str) -> None:
        with pytest.raises(SpecError, match="num_sms is a word of grids"):
            replace(SPEC, arguments=(Argument("num_sms", kind),), grid="1")
        replace(SPEC, arguments=(Argument("num_sms", "i32"),), grid="num_sms")

    @pytest.mark.parametrize("name", ["function", "function_arguments", "function_packed"])
    def test_an_argument_called_as_the_generated_code_is_refused(self, name: str) -> None:
        with pytest.raises(SpecError, match="an argument has the function's name"):
            replace(SPEC, arguments=(Argument(name, "i32"),), grid="1")

    def test_a_grid_cannot_read_a_pointer(self) -> None:
        with pytest.raises(SpecError, match="'X' is no integer argument"):
            replace(SPEC, grid="X")

    def test_a_tuning_of_a_constant_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(SpecError, match="the tuning for sm_90 sets BLOK"):
            replace(SPEC, tunings=(Tuning("sm_90", (("BLOK", 1),), 4, 3),))

    def test_a_wrong_tuning_is_refused_when_the_spec_is_made(self) -> None:
        with pytest.raises(SpecError, match="num_warps is 5"):
            replace(SPEC, tunings=(Tuning("sm_90", (), 5, 3),))


class TestVariantName:
    def test_it_is_readable_and_a_c_identifier(self) -> None:
        assert SPEC.variant == f"function_128_w4s3_hinted_{SPEC.digest}"
        assert SPEC.generic().variant == f"function_128_w4s3_generic_{SPEC.generic().digest}"

    def test_the_source_files_place_does_not_enter_it(self) -> None:
        assert replace(SPEC, source=Path("/elsewhere/other.py")).variant == SPEC.variant

    @pytest.mark.parametrize(
        "other",
        [
            replace(SPEC, kernel="other"),
            replace(SPEC, name="other"),
            replace(SPEC, arguments=(Argument("X", "*fp16"), Argument("n", "i32", 16))),
            replace(SPEC, arguments=(Argument("X", "*bf16", 16), Argument("n", "i32"))),
            replace(SPEC, constants=(("BLOCK", 64),)),
            replace(SPEC, grid="n"),
            replace(SPEC, num_warps=8),
            replace(SPEC, num_stages=2),
            replace(SPEC, tunings=(Tuning("sm_90", (), 8, 2),)),
        ],
    )
    def test_everything_else_does(self, other: KernelSpec) -> None:
        assert other.variant != SPEC.variant

    @given(st.lists(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=5), st.none()), max_size=6))
    def test_it_is_a_c_identifier_whatever_the_constants(self, values: list[int | float | bool | str | None]) -> None:
        constants = tuple((f"C{i}", value) for i, value in enumerate(values))

        variant = replace(SPEC, constants=constants, grid="n").variant

        assert variant.isidentifier()
        assert variant.isascii()

    def test_the_generic_spec_promises_nothing(self) -> None:
        assert [argument.hint for argument in SPEC.generic().arguments] == [None, None]
        assert SPEC.generic().algorithm == SPEC.algorithm
        assert SPEC.generic().prototype == SPEC.prototype


class TestFunctionName:
    @pytest.mark.parametrize("name", ["", "1a", "a-b", "a b", "int", "stream", "ä", "a.b"])
    def test_no_identifier_of_c_is_refused(self, name: str) -> None:
        with pytest.raises(SpecError, match="is not a C identifier"):
            check_function_name(name)

    @pytest.mark.parametrize("name", ["pyfmha_load", "_private", "__init"])
    def test_the_librarys_own_names_are_kept(self, name: str) -> None:
        with pytest.raises(SpecError, match="are kept for the library itself"):
            check_function_name(name)

    @pytest.mark.parametrize(
        "name", ["free", "calloc", "memcpy", "dlopen", "getenv", "vsnprintf", "main", "pthread_create"]
    )
    def test_a_function_of_the_c_library_is_refused(self, name: str) -> None:
        with pytest.raises(SpecError, match="is a function of the C library"):
            check_function_name(name)


class TestSignature:
    NAMES = ("X", "n", "BLOCK", "CAUSAL")

    def parse(self, text: str) -> tuple[tuple[Argument, ...], tuple[tuple[str, object], ...]]:
        read = parse_signature(text, self.NAMES, {"BLOCK", "CAUSAL"}, ["gelu"]).filled({"CAUSAL": True})
        assert read.tuples == ()
        return read.arguments, read.constants

    def test_types_hints_and_constants_are_told_apart(self) -> None:
        arguments, constants = self.parse("*fp16:16, i32:1, 128, False")

        assert arguments == (Argument("X", "*fp16", 16), Argument("n", "i32", 1))
        assert constants == (("BLOCK", 128), ("CAUSAL", False))

    def test_trailing_constants_with_a_default_may_be_left_out(self) -> None:
        assert self.parse("*fp16, i32, 128")[1] == (("BLOCK", 128), ("CAUSAL", True))

    @pytest.mark.parametrize(
        ("entry", "value"),
        [("-3", -3), ("0.5", 0.5), ("1e-3", 1e-3), ("True", True), ("None", None), ("'a, b'", "a, b"), ('"16"', "16")],
    )
    def test_constants_may_be_of_any_plain_type(self, entry: str, value: object) -> None:
        (_, constants) = self.parse(f"*fp16, i32, {entry}")

        assert constants[0] == ("BLOCK", value)
        assert type(constants[0][1]) is type(value)

    def test_a_run_time_parameter_may_be_fixed_to_a_constant(self) -> None:
        arguments, constants = self.parse("*fp16, 7, 128")

        assert [argument.name for argument in arguments] == ["X"]
        assert constants[0] == ("n", 7)

    @pytest.mark.parametrize("text", ["*fp16, i32", "*fp16", "*fp16, i32, 1, True, 2"])
    def test_a_wrong_length_is_refused_with_the_parameters(self, text: str) -> None:
        count = text.count(",") + 1
        takes = "4" if count > 4 else "3 to 4"
        with pytest.raises(
            SpecError, match=f"signature has {count} entries, the kernel takes {takes}: X, n, BLOCK, CAUSAL"
        ):
            self.parse(text)

    def test_entries_come_by_name_too(self) -> None:
        assert self.parse("*fp16, i32, CAUSAL=False, BLOCK = 64") == self.parse("*fp16, i32, 64, False")
        assert self.parse("*fp16, _, BLOCK=64, n=i32:16, CAUSAL=_") == self.parse("*fp16, i32:16, 64")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("*fp16, BLOCK=64, i32", "'i32' after entries by name"),
            ("*fp16, i32, 64, BLOCK=64", "gives BLOCK twice"),
            ("*fp16, i32, BLOK=64", "names 'BLOK', the kernel takes X, n, BLOCK, CAUSAL"),
            ("*fp16, i32, CAUSAL=True", "nothing is said of BLOCK"),
        ],
    )
    def test_names_that_do_not_fit_are_refused(self, text: str, said: str) -> None:
        with pytest.raises(SpecError, match=said):
            self.parse(text)

    @pytest.mark.parametrize(
        ("entry", "value"),
        [
            ("fp16", Dtype("fp16")),
            ("tl.bfloat16", Dtype("bf16")),
            ("float8e4nv", Dtype("fp8e4nv")),
            ("tl.int1", Dtype("i1")),
            ("uint8", Dtype("u8")),
            ("gelu", FunctionName("gelu")),
            ("ops.gelu", FunctionName("ops.gelu")),
            ("()", ()),
            ("(1, 'a', (fp32, None),)", (1, "a", (Dtype("fp32"), None))),
        ],
    )
    def test_constants_may_be_dtypes_functions_and_tuples(self, entry: str, value: Constant) -> None:
        constants = dict(self.parse(f"*fp16, i32, {entry}")[1])

        assert constants["BLOCK"] == value
        assert from_data(json.loads(json.dumps(to_data(value)))) == value

    @pytest.mark.parametrize("entry", ["tl.float32", "gelu"])
    def test_so_may_parameters_without_an_annotation(self, entry: str) -> None:
        assert [argument.name for argument in self.parse(f"*fp16, {entry}, 128")[0]] == ["X"]

    def test_elements_of_a_tuple_are_arguments_and_constants(self) -> None:
        read = parse_signature("((*fp16:16, 3), i32)", ("pair",), frozenset()).filled({})

        assert read.arguments == (Argument("pair_0_0", "*fp16", 16), Argument("pair_1", "i32"))
        assert read.constants == (("pair_0_1", 3),)
        assert read.tuples == (("pair", (("pair_0_0", "pair_0_1"), "pair_1")),)

    @pytest.mark.parametrize("text", ["", "*fp16,,128", "*fp16, i32, 128,", "*fp16 i32, 128, True", "*fp17, i32, 1"])
    def test_an_unknown_type_is_refused_with_the_arguments_name(self, text: str) -> None:
        with pytest.raises(SpecError, match=r"signature has|argument (X|n|BLOCK|CAUSAL)"):
            self.parse(text)

    @pytest.mark.parametrize("entry", ["i32:2", "i32:", "i32:x", "i32:-16", "i32:16:16", "i32:1.0"])
    def test_a_bad_hint_is_refused_with_those_allowed(self, entry: str) -> None:
        with pytest.raises(SpecError, match=r"argument n: hint .*:16 or :8 \(a multiple of it\) or :1 \(equal to 1\)"):
            self.parse(f"*fp16, {entry}, 128")

    def test_a_type_where_a_constant_is_needed_is_refused(self) -> None:
        with pytest.raises(SpecError, match=r"argument BLOCK is a tl.constexpr: give its value, not '\*i32'"):
            self.parse("*fp16, i32, *i32")

    def test_commas_in_brackets_and_quotes_do_not_split(self) -> None:
        assert split_signature("a<x, y>, 'b, c', (d, e)") == ["a<x, y>", "'b, c'", "(d, e)"]

    @given(st.lists(st.sampled_from([*SCALARS, *(f"*{name}:16" for name in SCALARS)]), min_size=1, max_size=30))
    def test_any_number_of_arguments_is_read_in_order(self, entries: list[str]) -> None:
        names = [f"x{i}" for i in range(len(entries))]

        read = parse_signature(" , ".join(entries), names, frozenset()).filled({})
        arguments, constants = read.arguments, read.constants

        assert [f"{a.type}{':16' if a.hint else ''}" for a in arguments] == entries
        assert [a.name for a in arguments] == names
        assert constants == ()

    @given(st.text(alphabet="*fpi1632:,. '\"-()<>\n", max_size=40))
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        try:
            arguments, constants = self.parse(text)
        except SpecError:
            return
        assert len(arguments) + len(constants) == len(self.NAMES)


class TestNamesOfOthers:
    @pytest.mark.parametrize("name", ["exp", "expf", "sqrtl", "free", "printf", "y0", "gamma"])
    def test_names_that_compilers_know_as_functions_are_refused(self, name: str) -> None:
        with pytest.raises(SpecError, match=f"function name '{name}'"):
            check_function_name(name)

    @pytest.mark.parametrize(
        ("kernel", "name"),
        [("_fwd", "fwd"), ("__add", "add"), ("_", "kernel_"), ("sin", "sin_kernel"), ("_exp", "exp_kernel"),
         ("new", "new_kernel"), ("_1", "kernel_1"), ("pyfmha_x", "kernel_pyfmha_x"), ("plain", "plain")],
    )  # fmt: skip
    def test_from_them_a_name_is_derived_that_is_not(self, kernel: str, name: str) -> None:
        assert derived_function_name(kernel) == name
        check_function_name(name)

    @pytest.mark.parametrize("name", ["new", "this", "template", "operator", "EOF", "SIZE_MAX", "typeof"])
    def test_arguments_named_as_words_of_c_and_cpp_get_an_underscore(self, name: str) -> None:
        assert Argument(name, "i32").c_name == f"{name}_"

    def test_a_tuning_for_no_architecture_is_refused(self) -> None:
        with pytest.raises(SpecError, match="a tuning is for 'sm90'; use one of sm_80"):
            replace(SPEC, tunings=(Tuning("sm90", (), 4, 3),))

    @pytest.mark.parametrize(("arch", "warps"), [("sm_103", 8), ("sm_110", 8), ("sm_121", 2), ("sm_87", 4)])
    def test_an_architecture_without_a_tuning_has_that_of_the_one_it_is_like(self, arch: str, warps: int) -> None:
        tuned = replace(SPEC, tunings=(Tuning("sm_100", (), 8, 3), Tuning("sm_120", (), 2, 3)))

        assert tuned.resolve(arch).num_warps == warps
        own = replace(tuned, tunings=(*tuned.tunings, Tuning(arch, (), 16, 3)))
        assert own.resolve(arch).num_warps == 16

    @pytest.mark.parametrize("ctas", [0, 3, 32, True, 2.0])
    def test_a_wrong_number_of_blocks_a_program_is_refused(self, ctas: int) -> None:
        with pytest.raises(SpecError, match=r"num_ctas is .*; use 1, 2, 4, 8 or 16"):
            replace(SPEC, num_ctas=ctas)

    def test_blocks_that_share_a_program_are_no_cluster_of_programs(self) -> None:
        with pytest.raises(SpecError, match="leave out cluster"):
            replace(SPEC, num_ctas=2, cluster=True, archs=("sm_90",))

    def test_the_workspace_is_the_last_argument(self) -> None:
        with pytest.raises(SpecError, match=r"the last argument is to be the workspace space, of type \*i8"):
            replace(SPEC, workspace="space")
        arguments = (*SPEC.arguments, Argument("space", "*i8"))
        spec = replace(SPEC, arguments=arguments, workspace="space")

        assert spec.kernel_arguments == SPEC.arguments
        assert spec.digest != replace(SPEC, arguments=arguments).digest

    @pytest.mark.parametrize("settings", [{"num_warps": 4.0}, {"num_stages": 3.0}, {"num_warps": True}])
    def test_settings_are_integers(self, settings: dict[str, int]) -> None:
        with pytest.raises(SpecError, match="num_"):
            replace(SPEC, **settings)
