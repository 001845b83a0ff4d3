// What the parts of the emulated driver know of each other.
#pragma once
#include <functional>
#include <string>

#include "emulation.h"

#define INTERNAL __attribute__((visibility("hidden")))

[[noreturn]] INTERNAL void fail(const std::string& what);
INTERNAL bool late();                     // asynchronous work is done as late as allowed, not as early
INTERNAL unsigned drawn(unsigned below);  // a number drawn from the seed
INTERNAL size_t thread_index();           // of the thread that runs
INTERNAL size_t thread_count();           // of a block
INTERNAL void block_until(std::function<bool()> may_go);
INTERNAL void* shared_at(unsigned address, size_t bytes, const char* what);

// hopper.cpp's part in the running of a block.
INTERNAL void hopper_begin();
INTERNAL bool hopper_progress();  // nothing else can run; whether something was done
INTERNAL void hopper_end();
