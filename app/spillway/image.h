// `spillway image create|info|check|map|resize|convert`: images as files, without daemon or config.
#pragma once

namespace CLI {
class App;
}

namespace spillway {

// Adds the commands to `app`; *exit_code is set when one has run.
void add_image_commands(CLI::App& app, int* exit_code);

}  // namespace spillway
