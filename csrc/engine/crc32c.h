// CRC-32C (Castagnoli), the checksum of iSCSI, ext4 and many file formats: finds every flipped bit, every burst of up
// to 32 bits, and of other damage all but one in 2^32. Not a protection against somebody who means to deceive.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vit::engine {

uint32_t crc32c(const void* data, std::size_t size);

// The same without the instruction that x86 has for it: 8 bytes at a time through tables.
uint32_t crc32c_by_tables(const void* data, std::size_t size);

}  // namespace vit::engine
