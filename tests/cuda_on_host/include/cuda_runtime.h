// Everything of CUDA that the kernels use is in one header.
#pragma once

#include "cuda_on_host.h"
