// How every device function is declared: a call costs more than most of them do.
#pragma once

#define GK_DEVICE __device__ __forceinline__
