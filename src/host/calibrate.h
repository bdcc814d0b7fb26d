// A disk's stored cost model: `<config>.d/<disk>.model` beside the config file, written by `spillway disk calibrate`,
// read when the disk's scheduler is made.
#pragma once

#include <string>

#include "src/control/config.h"
#include "src/qos/model.h"

namespace spillway {

// The stored model, or the default one when there is none. kInvalid names the file and line that is not understood.
Result<QosModel> stored_model(const Config& config, const std::string& disk);

// Measures the disk for about `seconds` and stores the model. Blocking; the disk must not be in use. `writes`: also
// measures writes, putting back what was there. Returns text for a person.
Result<std::string> calibrate_disk(const Config& config, const std::string& disk, double seconds, bool writes);

}  // namespace spillway
