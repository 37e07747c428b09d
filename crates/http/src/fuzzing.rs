//! Fuzz targets of this crate: every pure parser of external input, with properties that must hold for any input.
//! `fuzz/` runs them under libFuzzer.

use gateway_base::fuzzing::Target;

use crate::{client, server};

/// All targets by name, which is the name of the seed file.
pub const TARGETS: &[(&str, Target)] = &[
    ("chunked_body", client::fuzz::chunked_body),
    ("rejected_head", server::refusal::fuzz::refused_head),
    ("response_head", client::fuzz::response_head),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::TARGETS;

    #[test]
    fn every_target_accepts_its_seeds_and_their_prefixes() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/http");
        gateway_base::fuzzing::replay(&seeds, TARGETS).unwrap();
    }
}
