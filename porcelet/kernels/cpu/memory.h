// What the C library does with memory that is freed.
#pragma once

namespace porcelet {

// From now on freed blocks of up to 1 GiB stay with the process, instead of going back to the system, which clears every page that
// it lends anew. Returns whether the C library can be told so.
bool keep_freed_memory();

// Gives the system back what is free at this moment, where the C library can.
void return_freed_memory();

}  // namespace porcelet
