// Words conversations as llama.cpp's tools do. Reads a JSON list of {source, bos, eos, messages, generate} and writes
// the prompts, null where the engine fails, as a JSON list. Compiled against the runtime by tests/prompts.rs.
#include "chat.h"
#include "log.h"

#include <fstream>
#include <iostream>
#include <sstream>

int main(int argc, char ** argv) {
    if (argc != 2) {
        return 2;
    }
    common_log_set_verbosity_thold(-1);
    std::stringstream text;
    text << std::ifstream(argv[1]).rdbuf();
    common_json out = common_json::array();
    for (const auto & item : common_json::parse(text.str())) {
        try {
            auto templates = common_chat_templates_init(nullptr, item.at("source").get<std::string>(),
                                                        item.at("bos").get<std::string>(), item.at("eos").get<std::string>());
            common_chat_templates_inputs inputs;
            inputs.messages              = common_chat_msgs_parse_oaicompat(item.at("messages"));
            inputs.add_generation_prompt = item.at("generate").get<bool>();
            out.push_back(common_chat_templates_apply(templates.get(), inputs).prompt.str());
        } catch (const std::exception & e) {
            std::cerr << e.what() << "\n";
            out.push_back(nullptr);
        }
    }
    std::cout << out.dump() << "\n";
    return 0;
}
