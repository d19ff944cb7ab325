#version 450

#extension GL_EXT_shader_explicit_arithmetic_types_int8 : require

#include "dequant_head.glsl"

// A chunk of 32 weights per invocation.
layout(local_size_x = 256, local_size_y = 1, local_size_z = 1) in;

layout (binding = 0) readonly buffer A {A_TYPE data_a[];};
layout (binding = 1) writeonly buffer D {D_TYPE data_b[];};

void main() {
    const uint chunk = gl_GlobalInvocationID.x;
    if (chunk >= p.nel / 32) {
        return;
    }
    const uint ib = chunk / 4;
    const uint t  = chunk % 4;
    const vec2 dm = vec2(data_a[ib].dm);
    const uint high = data_a[ib].q[mbq3_high(t)];

    [[unroll]] for (uint w = 0; w < 8; ++w) {
        const vec4 v = vec4(unpack8(mbq3_codes(data_a[ib].q[mbq3_low(t, w)], high, w))) * dm.x + dm.y;
        [[unroll]] for (uint l = 0; l < 4; ++l) {
            data_b[32*chunk + 4*w + l] = D_TYPE(v[l]);
        }
    }
}
