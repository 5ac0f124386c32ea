"""A package whose import fails: what it needs is not here, as with most packages that hold kernels."""

import a_package_that_nobody_has  # noqa: F401
