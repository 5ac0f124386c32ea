import tensorrt as trt


def str_dtype_to_trt(dtype):
    names = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int32": "INT32"}
    return getattr(trt.DataType, names[dtype])
