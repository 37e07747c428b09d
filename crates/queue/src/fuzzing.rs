//! Fuzz targets of this crate: every pure parser of external input, with properties that must hold for any input.
//! `fuzz/` runs them under libFuzzer.

use gateway_base::fuzzing::Target;

use crate::{embedded, fuzz, jetstream, stan};

/// All targets by name, which is the name of the seed file.
pub const TARGETS: &[(&str, Target)] = &[
    ("embedded_batch", embedded::fuzz::packed_batch),
    ("embedded_call", fuzz::call),
    ("embedded_wal", embedded::fuzz::wal),
    ("jetstream_batch", jetstream::fuzz::batch),
    ("jetstream_message", jetstream::fuzz::message),
    ("jetstream_record", jetstream::fuzz::record),
    ("jetstream_subject", jetstream::fuzz::subject),
    ("stan_callback_url", stan::fuzz::callback_url),
    ("stan_message", stan::fuzz::message),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::TARGETS;

    #[test]
    fn every_target_accepts_its_seeds_and_their_prefixes() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/queue");
        gateway_base::fuzzing::replay(&seeds, TARGETS).unwrap();
    }
}
