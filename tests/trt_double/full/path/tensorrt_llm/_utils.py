import tensorrt as trt


def str_dtype_to_trt(dtype):
    names = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int32": "INT32"}
    assert dtype in names, f"unsupported dtype: {dtype}"
    return getattr(trt.DataType, names[dtype])
