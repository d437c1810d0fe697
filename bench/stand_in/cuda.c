/* A libcuda.so.1 without a GPU: one device, whose kernels load and "run" without doing anything, and are written down.

   What Triton's driver asks for, and no more; figures of the device are an H100's (CUDA driver API, CUdevice_attribute). */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void *stream, *attributes;
  unsigned attributes_count;
} LaunchConfig;

enum { MAX_SHARED_PER_BLOCK = 8, WARP_SIZE = 10, REGISTERS_PER_BLOCK = 12, MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75,
       CAPABILITY_MINOR = 76, REGISTERS_PER_SM = 82, MAX_SHARED_OPTIN = 97 };
enum { FUNCTION_THREADS = 0, FUNCTION_REGISTERS = 4, KEPT = 1 << 16 };

static int context;
static long loads, launches;
static const char *names[KEPT];
static LaunchConfig configs[KEPT];

long stand_in_loads(void) { return loads; }
long stand_in_launches(void) { return launches; }
const char *stand_in_name(long launch) { return names[launch % KEPT]; }
unsigned stand_in_grid(long launch) { return configs[launch % KEPT].grid_x; }

/* The parameters of the last launch, 8 bytes each, for whoever has said how many there are and how large each is. */
static int expected, sizes[256];
static uint64_t parameters_kept[256];
void stand_in_expect(int count, const int *of) { memcpy(sizes, of, (expected = count) * sizeof(int)); }
const uint64_t *stand_in_parameters(void) { return parameters_kept; }

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int *count) { *count = 0; return 0; }
Result cuDeviceGet(int *device, int index) { *device = index; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case MAX_SHARED_PER_BLOCK: *value = 48 << 10; break;
    case MAX_SHARED_OPTIN: *value = 227 << 10; break;
    case WARP_SIZE: *value = 32; break;
    case REGISTERS_PER_BLOCK: case REGISTERS_PER_SM: *value = 1 << 16; break;
    case MULTIPROCESSORS: *value = 132; break;
    case CAPABILITY_MAJOR: *value = 9; break;
    case CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1000000;
  }
  return 0;
}
Result cuCtxGetCurrent(void **current) { *current = &context; return 0; }
Result cuCtxSetCurrent(void *current) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDevicePrimaryCtxRetain(void **retained, int device) { *retained = &context; return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)(intptr_t)++loads; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = strdup(name); return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == FUNCTION_THREADS ? 1024 : attribute == FUNCTION_REGISTERS ? 128 : 0;
  return 0;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "an error of a driver that launches nothing"; return 0; }
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
Result cuPointerGetAttributes(unsigned count, int *attributes, void **data, uint64_t pointer) {
  for (unsigned i = 0; i < count; i++) *(uint64_t *)data[i] = pointer;
  return 0;
}
Result cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
  names[launches % KEPT] = function;
  configs[launches++ % KEPT] = *config;
  for (int i = 0; i < expected; i++) memcpy(memset(&parameters_kept[i], 0, 8), parameters[i], sizes[i]);
  return 0;
}
Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const LaunchConfig *config) { *count = 1; return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
Result cuTensorMapEncodeIm2colWide(void) { return 0; }
Result cuGetProcAddress_v2(void) { return 1; }
