// The two names that TensorRT's headers take from the CUDA toolkit, so that no toolkit is needed.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
