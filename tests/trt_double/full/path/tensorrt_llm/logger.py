import sys

import tensorrt as trt


class Logger(trt.ILogger):
    def log(self, severity, msg):
        if severity <= trt.ILogger.ERROR:
            sys.stderr.write(f"[TRT-LLM] {msg}\n")


trt_logger = Logger()
