"""The attributes of attention's plugin in Python: what :func:`pyfmha.trt.add_attention` makes of its keywords.

What is allowed is said in one place, the operator's description (:mod:`pyfmha.attention.operator`).
"""

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from pyfmha.attention.biased_operator import FLOAT, OWN
from pyfmha.attention.first import DTYPES
from pyfmha.attention.fp8 import DESCALES
from pyfmha.attention.operator import OPERATOR
from pyfmha.errors import PluginError
from pyfmha.operators.description import DATA_TYPES, TYPE_NAMES, Operator
from pyfmha.operators.forms import Forms
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import Program, program_of
from pyfmha.spec.words import dtype_name

INPUTS = ("Q", "K", "V")
"""The inputs of every layout but packed."""

DTYPE_NAMES = {dtype: TYPE_NAMES[dtype] for dtype in sorted(DTYPES, key=lambda dtype: DATA_TYPES[dtype])}
"""How TensorRT calls the types of Q, K and V."""

DTYPE_OF = {DATA_TYPES[dtype]: dtype for dtype in DTYPES}
"""Types of Out by ``int(trt.DataType)``, and of Q, K and V unless these are FP8."""


@cache
def attention_program() -> Program:
    """Attention's description, read: at first use, since it takes a tenth of a second, which no other command needs."""
    return program_of(OPERATOR)


@dataclass(frozen=True)
class Features:
    """What the first kernel does not do.

    Attributes:
        num_kv_heads: heads of K and V; each serves num_heads / num_kv_heads heads of Q.
        layout: one of :data:`pyfmha.attention.operator.LAYOUTS`.
        bottom_right: whether the mask and the window are aligned so that the last query sees the last key; else so
            that the first query sees the first key.
        window: how many keys a query sees to its left and to its right; -1 is no limit.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        return_lse: whether there is a second output, Lse: float32, the natural logarithm of the sum of exp(score).
        q_lengths, kv_lengths: whether there is an input INT32 [batch], the valid queries or keys of each sequence.
        cu_seqlens: whether the sequences lie behind each other without padding, with two inputs INT32 [batch + 1]
            that say where each begins.
        bias, sinks: the dtype of an input that is added to the scores, or in each row's sum: Q's or ``"fp32"``; empty
            where there is none.
        mask: whether there is an input BOOL that says which keys are seen.
        v_head_size: of V and Out; 0 for that of Q and K.
        fp8: whether Q, K and V are FP8 (e4m3); the problem's dtype is then that of Out alone, fp16 or bf16.
        q_descale, k_descale, v_descale: whether there is an input FLOAT, the factor of Q, K or V in FP8: [1], [key
            heads] or [batch, key heads].
    """

    num_kv_heads: int
    layout: str = "bhsd"
    bottom_right: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    return_lse: bool = False
    q_lengths: bool = False
    kv_lengths: bool = False
    cu_seqlens: bool = False
    bias: str = ""
    mask: bool = False
    sinks: str = ""
    v_head_size: int = 0
    fp8: bool = False
    q_descale: bool = False
    k_descale: bool = False
    v_descale: bool = False


@dataclass(frozen=True)
class Extension:
    """Attention with a user's function, which is an operator of its own.

    Attributes:
        operator: :func:`pyfmha.attention.function_operator.function_operator`, as the library has it.
        attributes: the function's numbers that no shape tells.
    """

    operator: Operator
    attributes: tuple[tuple[str, int | float | str], ...] = ()


@dataclass(frozen=True)
class Problem:
    """The attention that one plugin serves.

    Attributes:
        num_heads: heads of Q, and of K and V unless the features say otherwise.
        head_size: elements of one head: 1 to 256, without features those of :data:`pyfmha.attention.first.HEAD_SIZES`.
        dtype: of Out, and of Q, K and V unless the features say fp8: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        softmax_scale: factor of Q K^T.
        causal: whether a query sees only keys at its own position and before.
        features: None for the first kernel.
        extension: a function of the user's; it goes with features.

    Raises:
        PluginError: on creation, for values that no kernel serves.
    """

    num_heads: int
    head_size: int
    dtype: str
    softmax_scale: float
    causal: bool
    features: Features | None = None
    extension: Extension | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        _ = self.instance

    @cached_property
    def instance(self) -> Instance:
        """The operator with these attributes."""
        return _instance(self.extension, tuple(self.attributes().items()))

    @property
    def program(self) -> Program:
        """The operator."""
        return attention_program() if self.extension is None else program_of(self.extension.operator)

    @property
    def function_name(self) -> str:
        """The C function that serves it."""
        return self.instance.main_functions()[0]

    @property
    def padded_size(self) -> int:
        """The head size that its kernel is compiled for."""
        return self.head_size if self.features is None else int(self.instance.scope.values["padded"])  # type: ignore[arg-type]

    @property
    def v_size(self) -> int:
        """The head size of V and Out."""
        return self.head_size if self.features is None else self.features.v_head_size or self.head_size

    @property
    def kv_heads(self) -> int:
        """Heads of K and V."""
        return self.num_heads if self.features is None else self.features.num_kv_heads

    def attributes(self) -> dict[str, int | float | str]:
        """The creation attributes by name: the earlier five, and where there are features all others."""
        earlier: dict[str, int | float | str] = {
            "num_heads": self.num_heads,
            "head_size": self.head_size,
            "type_id": DATA_TYPES.get(self.dtype, -1),
            "softmax_scale": self.softmax_scale,
            "causal": int(self.causal),
        }
        if self.features is None:
            return earlier
        more = self.features
        return earlier | {
            "num_kv_heads": more.num_kv_heads,
            "layout": more.layout,
            "bottom_right": int(more.bottom_right),
            "window_left": more.window[0],
            "window_right": more.window[1],
            "softcap": more.softcap,
            "return_lse": int(more.return_lse),
            "q_lengths": int(more.q_lengths),
            "kv_lengths": int(more.kv_lengths),
            "cu_seqlens": int(more.cu_seqlens),
            **self._beside(more),
            **dict(() if self.extension is None else self.extension.attributes),
        }

    def node_attributes(self) -> dict[str, int | float | str]:
        """Those of an ONNX node: every one that the creator knows, since TensorRT's parser warns of those it misses."""
        absent = {"bias": 0, "mask": 0, "sinks": 0, "v_head_size": self.head_size}
        absent |= dict.fromkeys(("fp8", *DESCALES), 0)
        return self.attributes() | {name: value for name, value in absent.items() if name not in self.attributes()}

    def _beside(self, more: Features) -> dict[str, int | float | str]:
        """The attributes of what not every attention has, where it has it: those of others are as they ever were."""
        found: dict[str, int | float | str] = {}
        for name, dtype in (("bias", more.bias), ("sinks", more.sinks)):
            if dtype and dtype not in (self.dtype, "fp32"):
                raise PluginError(f"{name} is of {dtype}; allowed are {self.dtype}, as Q, and fp32")
            if dtype:
                found[name] = OWN if dtype == self.dtype else FLOAT
        if more.mask:
            found["mask"] = 1
        if more.v_head_size not in (0, self.head_size):
            found["v_head_size"] = more.v_head_size
        return found | {name: 1 for name in ("fp8", *DESCALES) if getattr(more, name)}

    def forms(self, *ranks: int) -> Forms:
        """Its tensors; the numbers of dimensions of the inputs tell packed ones, and broadcast ones, apart."""
        return self.instance.forms(ranks)

    def __str__(self) -> str:
        return str(self.instance)


@lru_cache(maxsize=256)
def _instance(extension: Extension | None, attributes: tuple[tuple[str, int | float | str], ...]) -> Instance:
    return Instance(attention_program() if extension is None else program_of(extension.operator), dict(attributes))
