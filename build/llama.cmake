# How this build compiles what is not hot in llama.cpp, for about half of the processor time of its own settings. cmake reads it
# by CMAKE_PROJECT_llama.cpp_INCLUDE. ggml, the sampler, the tokenizer, the cache and the preparation of pictures keep their
# flags.
#
# - Small files that mostly include the same headers are compiled together (CMAKE_UNITY_BUILD's units).
# - Chat templates, grammars, arguments, loading and the building of graphs run once or once per token: -O1.
if(CMAKE_VERSION VERSION_LESS 3.19)
    return()
endif()

# The sources of a target that match, or that do not (EXCLUDE), as absolute paths.
function(mbq_sources result target mode pattern)
    get_target_property(sources ${target} SOURCES)
    get_target_property(folder ${target} SOURCE_DIR)
    list(FILTER sources ${mode} REGEX "${pattern}")
    set(all "")
    foreach(source ${sources})
        get_filename_component(source "${source}" ABSOLUTE BASE_DIR "${folder}")
        list(APPEND all "${source}")
    endforeach()
    set(${result} "${all}" PARENT_SCOPE)
endfunction()

# Compiles the sources that match `pattern` in units of `count`, the others alone.
function(mbq_together target pattern count)
    mbq_sources(alone ${target} EXCLUDE "${pattern}")
    set_source_files_properties(${alone} TARGET_DIRECTORY ${target} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE ${count})
endfunction()

# -O1 for a target, but for the sources that match `hot`.
function(mbq_light target hot)
    if(NOT TARGET ${target} OR MSVC OR NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
        return()
    endif()
    target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>)
    if(hot)
        mbq_sources(kept ${target} INCLUDE "${hot}")
        set_source_files_properties(${kept} TARGET_DIRECTORY ${target} PROPERTIES COMPILE_OPTIONS $<$<CONFIG:Release>:-O3>)
    endif()
endfunction()

function(mbq_settings)
    mbq_together(mtmd "models/[^/]*[.]cpp$" 16)
    mbq_together(llama-common "(parsers|jinja)/[^/]*[.]cpp$" 12)
    mbq_light(llama "llama-(batch|kv-cache.*|memory.*|quant|sampler|vocab)[.]cpp$|unicode")
    mbq_light(mtmd "mtmd[^/]*[.]cpp$")
    mbq_light(llama-common "sampling[.]cpp$")
    foreach(target cpp-httplib llama-mtmd-cli llama-bench-impl llama-quantize-impl llama-completion-impl llama-gguf-split)
        mbq_light(${target} "")
    endforeach()
endfunction()
cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL mbq_settings)
