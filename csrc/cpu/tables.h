// A table of kernels exists once per capability, in a namespace of its name; `pick` of
// csrc/capability.h chooses among them at run time.
#pragma once

#if defined(__x86_64__)
#define SAPT_FAST_DECLARE_TABLE(Type, name) \
    namespace default_ {                    \
    extern const Type name;                 \
    }                                       \
    namespace avx2 {                        \
    extern const Type name;                 \
    }                                       \
    namespace avx512 {                      \
    extern const Type name;                 \
    }                                       \
    namespace avx512_bf16 {                 \
    extern const Type name;                 \
    }
#define SAPT_FAST_PICK(name) pick(default_::name, avx2::name, avx512::name, avx512_bf16::name)
#else
#define SAPT_FAST_DECLARE_TABLE(Type, name) \
    namespace default_ {                    \
    extern const Type name;                 \
    }
#define SAPT_FAST_PICK(name) default_::name
#endif
