"""A kernel on the CPU, under Triton's interpreter: in this process, or in one of its own. Needs numpy and Triton."""
