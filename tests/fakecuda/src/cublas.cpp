// cuBLAS and cuBLASLt: matrix products are recorded with their shapes; those in FP8 and FP4 must meet the documented
// layout.
// Without cuda_fp16.h and cuda_bf16.h, which need headers that PyTorch's wheels lack: these types suffice.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
struct __half;
struct __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "fakecuda.h"

using namespace fakecuda;

// ---- cuBLAS. A handle stores its stream.

static cudaStream_t& stream_of_handle(cublasHandle_t handle) { return *reinterpret_cast<cudaStream_t*>(handle); }

// Allocates on the device (cuBLAS documentation, cublasCreate()), which a capture forbids.
EXPORT cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  if (check_capture("cublasCreate")) return CUBLAS_STATUS_NOT_INITIALIZED;
  *handle = reinterpret_cast<cublasHandle_t>(new cudaStream_t(nullptr));
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  delete &stream_of_handle(handle);
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  stream_of_handle(handle) = stream;
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }

EXPORT cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }

EXPORT cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t) { return CUBLAS_STATUS_SUCCESS; }

EXPORT cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t product(cublasHandle_t handle, int m, int n, int k, int type, int batch = 1) {
  char operation[96];
  snprintf(operation, sizeof operation, "gemm %d x %d x %d type %d batch %d", m, n, k, type, batch);
  const cudaError_t error = enqueue_kernel(stream_of(stream_of_handle(handle)), operation);
  return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

EXPORT cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                   const void*, const void*, cudaDataType type, int, const void*, cudaDataType, int,
                                   const void*, void*, cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t) {
  return product(handle, m, n, k, type);
}

EXPORT cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t, cublasOperation_t, int m,
                                                 int n, int k, const void*, const void*, cudaDataType type, int,
                                                 long long, const void*, cudaDataType, int, long long, const void*,
                                                 void*, cudaDataType, int, long long, int batch, cublasComputeType_t,
                                                 cublasGemmAlgo_t) {
  return product(handle, m, n, k, type, batch);
}

EXPORT cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                     const float*, const float*, int, const float*, int, const float*, float*, int) {
  return product(handle, m, n, k, CUDA_R_32F);
}

EXPORT cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t, cublasOperation_t, int m,
                                                int n, int k, const float*, const float*, int, long long, const float*,
                                                int, long long, const float*, float*, int, long long, int batch) {
  return product(handle, m, n, k, CUDA_R_32F, batch);
}

EXPORT cublasStatus_t cublasSgemv_v2(cublasHandle_t handle, cublasOperation_t, int m, int n, const float*, const float*,
                                     int, const float*, int, const float*, float*, int) {
  return product(handle, m, n, 1, CUDA_R_32F);
}

EXPORT cublasStatus_t cublasDgemm_v2(cublasHandle_t handle, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                     const double*, const double*, int, const double*, int, const double*, double*,
                                     int) {
  return product(handle, m, n, k, CUDA_R_64F);
}

// ---- cuBLASLt

namespace {

struct Layout {
  cudaDataType type;
  uint64_t rows, columns;
  int64_t leading_dimension;
};

class Description {
 public:
  void set(cublasLtMatmulDescAttributes_t attribute, const void* value, size_t size) {
    const char* bytes = static_cast<const char*>(value);
    attributes_[attribute].assign(bytes, bytes + size);
  }

  template <class T>
  T get(cublasLtMatmulDescAttributes_t attribute, T otherwise) const {
    const auto entry = attributes_.find(attribute);
    if (entry != attributes_.end()) memcpy(&otherwise, entry->second.data(), sizeof otherwise);
    return otherwise;
  }

 private:
  std::map<int, std::vector<char>> attributes_;
};

struct Product {
  const Description& description;
  const void *a, *b, *result;
  const Layout &a_layout, &b_layout, &result_layout;

  bool transposes_a() const { return description.get<int32_t>(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_N); }
  bool transposes_b() const { return description.get<int32_t>(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N); }
  uint64_t k() const { return transposes_a() ? a_layout.rows : a_layout.columns; }
};

bool aligned(const void* address) { return uintptr_t(address) % 16 == 0; }

// cuBLAS documentation, cublasLtMatmul(), "To use FP8 kernels, the following set of requirements must be satisfied".
const char* layout_problem(const Product& product) {
  const auto scale = [&](cublasLtMatmulDescAttributes_t which) {
    return on_device(product.description.get<void*>(which, nullptr));
  };
  if (!product.transposes_a() || product.transposes_b()) return "A must be transposed and B must not";
  if (product.result_layout.rows % 16 || product.k() % 16 || product.a_layout.leading_dimension % 16 ||
      product.b_layout.leading_dimension % 16) {
    return "m, k and the leading dimensions must be multiples of 16";
  }
  if (!aligned(product.a) || !aligned(product.b) || !aligned(product.result)) return "addresses must be multiples of 16";
  if (!scale(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER) || !scale(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER)) {
    return "the scales must be in device memory";
  }
  return nullptr;
}

// cuBLAS documentation, "1D Block Scaling for FP8 and FP4 Data Types", and the table of narrow precisions. Dimensions
// count numbers, of which a byte has two.
const char* fp4_problem(const Product& product) {
  const auto blocks_of_16 = [&](cublasLtMatmulDescAttributes_t which) {
    return product.description.get<int32_t>(which, -1) == CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3;
  };
  if (settings().capability < 100) return "FP4 needs compute capability 10.0";
  if (!blocks_of_16(CUBLASLT_MATMUL_DESC_A_SCALE_MODE) || !blocks_of_16(CUBLASLT_MATMUL_DESC_B_SCALE_MODE)) {
    return "A and B must have a scale per block of 16";
  }
  if (product.k() % 32 || product.a_layout.leading_dimension % 32 || product.b_layout.leading_dimension % 32) {
    return "k and the leading dimensions of A and B must be multiples of 32";
  }
  return layout_problem(product);
}

const char* product_problem(const Product& product) {
  switch (product.a_layout.type) {
    case CUDA_R_8F_E4M3:
      return layout_problem(product);
    case CUDA_R_4F_E2M1:
      return fp4_problem(product);
    default:
      return nullptr;
  }
}

}  // namespace

EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description, cublasComputeType_t, cudaDataType_t) {
  *description = reinterpret_cast<cublasLtMatmulDesc_t>(new Description);
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
  delete reinterpret_cast<Description*>(description);
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                                     cublasLtMatmulDescAttributes_t attribute, const void* value,
                                                     size_t size) {
  reinterpret_cast<Description*>(description)->set(attribute, value, size);
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                                 uint64_t columns, int64_t leading_dimension) {
  *layout = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, rows, columns, leading_dimension});
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete reinterpret_cast<Layout*>(layout);
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t,
                                                       const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = reinterpret_cast<cublasLtMatmulPreference_t>(new char);
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete reinterpret_cast<char*>(preference);
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                           cublasLtMatmulPreferenceAttributes_t, const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}

// Every product has one algorithm, which needs no workspace.
EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                                     cublasLtMatmulHeuristicResult_t* results, int* number) {
  results[0] = {};
  results[0].state = CUBLAS_STATUS_SUCCESS;
  *number = 1;
  return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void*, const void* a,
                                     cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                                     const void*, const void*, cublasLtMatrixLayout_t, void* result,
                                     cublasLtMatrixLayout_t result_layout, const cublasLtMatmulAlgo_t*, void*, size_t,
                                     cudaStream_t stream) {
  const Product product = {*reinterpret_cast<Description*>(description),
                           a,
                           b,
                           result,
                           *reinterpret_cast<Layout*>(a_layout),
                           *reinterpret_cast<Layout*>(b_layout),
                           *reinterpret_cast<Layout*>(result_layout)};
  const Layout& out = product.result_layout;
  char operation[128];
  snprintf(operation, sizeof operation, "gemm Lt %lu x %lu x %lu types %d %d fast accumulation %d epilogue %d", out.rows,
           out.columns, product.k(), product.a_layout.type, out.type,
           product.description.get<int8_t>(CUBLASLT_MATMUL_DESC_FAST_ACCUM, 0),
           product.description.get<int32_t>(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_DEFAULT));
  const char* problem = product_problem(product);
  if (!on_device(a) || !on_device(b) || !on_device(result)) problem = "matrices must be in device memory";
  if (problem) {
    violation("%s: %s", operation, problem);
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  const cudaError_t error = enqueue_kernel(stream_of(stream), operation);
  return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
