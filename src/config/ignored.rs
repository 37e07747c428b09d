//! Warnings about variables that have no effect on `gateway up`. No I/O.

use std::net::IpAddr;

use crate::config::reader::SettingsReader;
use crate::config::settings::{Role, SETTINGS};

/// Returns a warning for each variable that only other roles read.
pub(super) fn warnings(settings: &SettingsReader<'_>) -> Vec<String> {
    let foreign = SETTINGS.iter().filter(|setting| !setting.roles.contains(&Role::Up));
    let set = foreign
        .filter_map(|setting| Some((setting.name, settings.environment_variable(setting.name)?)));
    let set = set.filter(|(_, value)| !value.trim().is_empty());
    let is_loopback = |value: &str| value.trim().parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    set.filter_map(|(name, value)| match name {
        "listen_address" | "provider_address" if is_loopback(&value) => None,
        "listen_address" | "provider_address" => Some(format!(
            "{name} is ignored: gateway up listens on 127.0.0.1 only. For access from other machines, put a reverse \
             proxy in front of it, or run gateway serve and gateway provider process"
        )),
        _ => Some(format!("{name} is ignored: gateway up does not have this setting")),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Up;

    #[test]
    fn up_warns_of_settings_that_it_does_not_have() {
        let warnings = |name: &'static str, value: &'static str| {
            let var = |asked: &str| (asked == name).then(|| value.to_owned());
            Up::parse(SettingsReader::new(&|_| None, &var), None).unwrap().warnings
        };
        let said = warnings("listen_address", "0.0.0.0");
        assert!(said[0].starts_with("listen_address is ignored: gateway up listens on 127.0.0.1"));
        assert!(warnings("faas_nats_address", "nats")[0].starts_with("faas_nats_address is"));
        assert!(warnings("listen_address", "127.0.0.1").is_empty());
        assert!(warnings("port", "1").is_empty() && warnings("provider_address", "").is_empty());
    }
}
