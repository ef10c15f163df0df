# The part of the inference engine that knows no device: built into every backend that provides executor.h.
set(VIT_ENGINE api build config crc32c engine file memory names open parts)
list(TRANSFORM VIT_ENGINE REPLACE "(.+)" "${CMAKE_CURRENT_LIST_DIR}/\\1.cpp")
