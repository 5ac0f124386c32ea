import tensorrt as trt


def str_dtype_to_trt(dtype):
    return {"float16": trt.DataType.HALF, "bfloat16": trt.DataType.BF16, "float32": trt.DataType.FLOAT}[dtype]
