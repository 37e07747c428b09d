//! One program for all fuzz targets: the variable `FUZZ_TARGET` selects the target.

#![no_main]

use std::sync::OnceLock;

use gateway::fuzzing;
use gateway_base::fuzzing::Target;
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
        fuzzing::target(&name).unwrap_or_else(|| panic!("FUZZ_TARGET={name:?} is not a target"))
    });
    target(data);
});
