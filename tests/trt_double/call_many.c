/* The plugin's calls as a C++ host makes them, many in a row: each function returns the mean time of one call in
   microseconds, or -1 where a call failed. No Python and no ctypes is between two calls, so what is timed is the call.

   The functions called are those of a binding's C++ objects (nvinfer1::IPluginV3OneRuntime, see vtable.py), and of the
   launch library. Compiled by tests/trt_gpu_parts.py. */
#define _POSIX_C_SOURCE 199309L
#include <stdint.h>
#include <time.h>

typedef int32_t enqueue_function(void *plugin, const void *input_desc, const void *output_desc,
                                 const void *const *inputs, void *const *outputs, void *workspace, void *stream);
typedef int32_t shape_change_function(void *plugin, const void *inputs, int32_t input_count, const void *outputs,
                                      int32_t output_count);
typedef int launch_function(const void *arguments);

double enqueue_many(enqueue_function *enqueue, void *plugin, const void *descs, const void *const *inputs,
                    void *const *outputs, void *workspace, void *stream, int count);
double shape_change_many(shape_change_function *change, void *plugin, const void *first, const void *second, int count);
double launch_many(launch_function *launch, const void *arguments, int count);

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec * 1e-3;
}

/* Descriptors are not looked at: the inputs' serve for the output, too. */
double enqueue_many(enqueue_function *enqueue, void *plugin, const void *descs, const void *const *inputs,
                    void *const *outputs, void *workspace, void *stream, int count)
{
    double begin = now();
    for (int i = 0; i < count; i++)
        if (enqueue(plugin, descs, descs, inputs, outputs, workspace, stream))
            return -1;
    return (now() - begin) / count;
}

/* Three inputs and an output of one shape, by turns of the first and the second. */
double shape_change_many(shape_change_function *change, void *plugin, const void *first, const void *second, int count)
{
    double begin = now();
    for (int i = 0; i < count; i++) {
        const void *descs = i % 2 ? second : first;
        if (change(plugin, descs, 3, descs, 1))
            return -1;
    }
    return (now() - begin) / count;
}

double launch_many(launch_function *launch, const void *arguments, int count)
{
    double begin = now();
    for (int i = 0; i < count; i++)
        if (launch(arguments))
            return -1;
    return (now() - begin) / count;
}
