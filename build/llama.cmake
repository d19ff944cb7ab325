# How this build compiles what is not hot in llama.cpp, for about half of the processor time of its own settings. cmake reads it
# by CMAKE_PROJECT_llama.cpp_INCLUDE. ggml, the sampler, the tokenizer, the cache and the preparation of pictures keep their
# flags.
#
# - Small files that mostly include the same headers are compiled together (CMAKE_UNITY_BUILD's units).
# - Chat templates, grammars, loading and the building of graphs run once or once per token: -O1; arguments, downloads and
#   tables of constants: -O0.
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

# Another level of optimisation for the sources of a target that match.
function(mbq_level target level pattern)
    mbq_sources(chosen ${target} INCLUDE "${pattern}")
    set_source_files_properties(${chosen} TARGET_DIRECTORY ${target} PROPERTIES COMPILE_OPTIONS $<$<CONFIG:Release>:${level}>)
endfunction()

function(mbq_settings)
    mbq_together(mtmd "models/[^/]*[.]cpp$" 16)
    mbq_together(llama-common "parsers/|jinja/|(chat|json-|peg|preset|download|hf-cache|reasoning|imatrix|speculative|ngram|trie|unicode|fit|debug)[^/]*[.]cpp$" 12)
    if(MSVC OR NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
        return()
    endif()
    foreach(target llama mtmd llama-common llama-mtmd-cli llama-bench-impl llama-quantize-impl llama-completion-impl
            llama-gguf-split)
        target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>)
    endforeach()
    target_compile_options(cpp-httplib PRIVATE $<$<CONFIG:Release>:-O0>)
    mbq_level(llama -O3 "llama-(batch|kv-cache|kv-cache-iswa|sampler|vocab)[.]cpp$")
    mbq_level(llama -O0 "unicode-data[.]cpp$")
    mbq_level(mtmd -O3 "mtmd[^/]*[.]cpp$")
    mbq_level(llama-common -O3 "sampling[.]cpp$")
    mbq_level(llama-common -O0 "arg[.]cpp$")
endfunction()
cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL mbq_settings)
