"""The exceptions of pyfmha.

::

    PyfmhaError
    |-- SpecError (ValueError)      what to compile is ill-described: signature, hint, grid, name, architecture
    |-- KernelSourceError           the kernel file is missing, raises, or does not hold the kernel
    |-- CompileError                Triton or ptxas refused the kernel
    |   `-- SharedMemoryError       it compiles, but needs more shared memory than the architecture has
    |-- ToolchainError              no C compiler, Triton missing, or the C compiler failed
    |-- OutputError (OSError)       a file could not be read or written
    |-- ManifestError               a manifest is corrupt, foreign, or of another schema version
    |-- LibraryError                a shared library is missing, foreign, or not the manifest's
    |-- TensorError (ValueError)    a tensor given is on another device, of another type, or cannot be read or written
    |-- DriverError                 a CUDA call failed; carries ``code``
    |   `-- LaunchError             a launch failed or was refused
    |-- InterpreterError            Triton's interpreter cannot run here
    |-- PluginError                 TensorRT, or the plugin's fields or tactics, cannot be used as asked
    |-- EngineError                 an engine cannot be built, saved, loaded or run as asked
    |-- OnnxError                   an ONNX model cannot be read, rewritten, written or proven as asked
    |-- BenchError                  results of the benchmark cannot be read or compared
    `-- GraphApiError               TensorRT-LLM is missing, or has no graph API

Each message says what was got, what is allowed and, where there is one, the command to run next.
"""


class PyfmhaError(Exception):
    """Base of every error pyfmha raises on purpose."""


class SpecError(PyfmhaError, ValueError):
    """A kernel specification is ill-formed."""


class KernelSourceError(PyfmhaError):
    """A kernel file cannot be read or imported, or lacks the kernel asked for."""


class CompileError(PyfmhaError):
    """Triton or ptxas refused a kernel."""


class SharedMemoryError(CompileError):
    """A compiled kernel asks for more shared memory than its architecture offers a block."""


class ToolchainError(PyfmhaError):
    """A tool needed to build is missing or failed."""


class OutputError(PyfmhaError, OSError):
    """A file or folder cannot be read or written."""


class ManifestError(PyfmhaError):
    """A manifest cannot be used."""


class LibraryError(PyfmhaError):
    """A shared library cannot be used."""


class TensorError(PyfmhaError, ValueError):
    """A tensor of another package cannot be used as asked."""


class DriverError(PyfmhaError):
    """A CUDA driver call failed.

    Attributes:
        code: the ``CUresult`` value.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class LaunchError(DriverError):
    """A kernel launch failed, or was refused before it reached the GPU."""


class InterpreterError(PyfmhaError):
    """Triton's interpreter cannot run the kernel in this process."""


class PluginError(PyfmhaError):
    """The plugin, its creator, its fields or its tactics cannot be used as asked."""


class EngineError(PyfmhaError):
    """An engine cannot be built, saved, loaded or run as asked."""


class OnnxError(PyfmhaError):
    """An ONNX model cannot be read, rewritten, written or proven."""


class BenchError(PyfmhaError):
    """Results of the benchmark cannot be read, or not be compared."""


class GraphApiError(PyfmhaError):
    """TensorRT-LLM is missing, or is a release without the graph API."""
