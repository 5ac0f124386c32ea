"""Names in the generated C: which an argument or a function cannot have."""

import re

from pyfmha.errors import SpecError

# Words that may not be an argument's or a function's name in the generated C.
_WORDS = frozenset(
    """
    auto break case char const continue default do double else enum extern float for goto if inline int long
    register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
    bool true false stream algo_id variant kernel kernels images refuse scratch params grid bad CUstream
    CUresult CUdeviceptr NULL errno int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t size_t
    linux unix asm
    alignas alignof and and_eq bitand bitor catch class compl const_cast constexpr decltype delete dynamic_cast
    explicit export friend mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected
    public reinterpret_cast static_assert static_cast template this thread_local throw try typeid typename using
    virtual wchar_t xor xor_eq typeof intptr_t uintptr_t ptrdiff_t offsetof
    NAN INFINITY HUGE_VAL HUGE_VALF HUGE_VALL MATH_ERRNO MATH_ERREXCEPT math_errhandling
    EOF BUFSIZ FILENAME_MAX FOPEN_MAX TMP_MAX RAND_MAX MB_CUR_MAX EXIT_SUCCESS EXIT_FAILURE L_tmpnam
    SEEK_SET SEEK_CUR SEEK_END stdin stdout stderr
    """.split()  # noqa: SIM905  (a list would take a line a word)
)
# Macros of <stdint.h> and <math.h>, which come in families.
_FAMILIES = re.compile(
    r"(U?INT(_LEAST|_FAST)?(8|16|32|64)|U?INTMAX|U?INTPTR|PTRDIFF|SIZE|WCHAR|WINT|SIG_ATOMIC)_(MIN|MAX|C)|FP_[A-Z0-9]+"
)

# Functions of the C library which an exported function of that name would replace.
_FUNCTIONS = frozenset(
    """
    main malloc calloc realloc free abort exit atexit getenv memcpy memmove memset memcmp strlen strcmp strcpy
    printf snprintf vsnprintf fprintf puts dlopen dlsym dlclose dlerror open close read write signal time
    abs labs llabs fabs exp exp2 exp10 expm1 log log2 log10 log1p pow pow10 sqrt cbrt hypot sin cos tan asin acos atan
    atan2 sinh cosh tanh asinh acosh atanh sincos erf erfc gamma lgamma tgamma ceil floor round lround llround trunc
    rint lrint llrint nearbyint fmin fmax fdim fma fmod drem remainder remquo ldexp frexp modf scalb scalbn scalbln
    logb ilogb copysign nextafter nexttoward significand signbit nan j0 j1 jn y0 y1 yn ffs index rindex bcmp bcopy
    bzero alloca toupper tolower isalnum isalpha isblank iscntrl isdigit isgraph islower isprint ispunct isspace
    isupper isxdigit strcat strncat strncpy strncmp strchr strrchr strstr strspn strcspn strpbrk strdup strndup
    stpcpy memchr mempcpy putchar putc fputs fputc fwrite scanf sscanf fscanf vprintf vfprintf vsprintf sprintf
    aligned_alloc posix_memalign execl execv fork div ldiv rand srand system qsort bsearch
    """.split()  # noqa: SIM905  (a list would take a line a word)
)


_OTHER = "give another: --out-name"


def _is_word(name: str) -> bool:
    return name in _WORDS or _FAMILIES.fullmatch(name) is not None


def c_argument_name(name: str) -> str:
    """An argument's name in C: its own, with an underscore where that is a word of C or of the generated code."""
    taken = _is_word(name) or name.startswith(("pyfmha_", "PYFMHA_")) or name.endswith("_bits")
    return f"{name}_" if taken else name


def derived_function_name(kernel: str) -> str:
    """The C function of a kernel that was given no other name: its own, else one like it that C can have.

    Leading underscores go (``_fwd`` is ``fwd``); a word of C and a function of its library become ``exp_kernel``.
    """
    name = kernel.lstrip("_")
    for candidate in (kernel, name, f"{name}_kernel", f"kernel_{name}"):
        try:
            check_function_name(candidate)
        except SpecError:
            continue
        return candidate
    return kernel


def check_function_name(name: str) -> None:
    """Refuse a C function name that would not compile or would clash with the library's own.

    Raises:
        SpecError: saying why.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or _is_word(name):
        raise SpecError(
            f"function name {name!r} is not a C identifier: use letters, digits and _, not starting with a digit;"
            f" {_OTHER}"
        )
    if name.rstrip("fl") in _FUNCTIONS or name in _FUNCTIONS or name.startswith("pthread_"):
        raise SpecError(f"function name {name!r} is a function of the C library, which it would replace; {_OTHER}")
    if name.startswith(("pyfmha_", "_")):
        raise SpecError(
            f"function name {name!r}: names starting with 'pyfmha_' or '_' are kept for the library itself; {_OTHER}"
        )
