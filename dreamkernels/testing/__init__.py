"""For testing operators: error bounds, compilation, repeatability, instruction sets, the interpreter's bfloat16."""

from dreamkernels.libraries import cpu_isa, set_cpu_isa, supported_cpu_isas
from dreamkernels.testing.checks import assert_compiles_once, assert_repeats_bitwise, check_operator, using_cpu_isa
from dreamkernels.testing.errors import assert_within_eager_error, error_of

__all__ = [
    "assert_compiles_once",
    "assert_repeats_bitwise",
    "assert_within_eager_error",
    "check_operator",
    "cpu_isa",
    "error_of",
    "set_cpu_isa",
    "supported_cpu_isas",
    "using_cpu_isa",
]
