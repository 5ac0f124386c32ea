"""``pyfmha bench``: attention timed side by side on this GPU.

Pure, and tested without a GPU: :mod:`~pyfmha.bench.cells` (what is computed), :mod:`~pyfmha.bench.figures` (times to
numbers), :mod:`~pyfmha.bench.results` (the JSON), :mod:`~pyfmha.bench.table`, :mod:`~pyfmha.bench.plot`,
:mod:`~pyfmha.bench.compare`. :mod:`~pyfmha.bench.protocol` is the border; behind it stand the contenders and the clock:
:mod:`~pyfmha.bench.inputs`, :mod:`~pyfmha.bench.clock`, :mod:`~pyfmha.bench.ours`, which need numpy and cuda-python,
:mod:`~pyfmha.bench.torch_rows` and :mod:`~pyfmha.bench.tensorrt_row`, which import what they are named after only when
they run. :mod:`~pyfmha.bench.measure` brings both sides together, :mod:`~pyfmha.bench.command` is the command.
"""
