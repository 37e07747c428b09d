//! Allow-list of callback destinations. A client chooses the URL, and this process can reach addresses that the client
//! must not reach: its own ports, link-local hosts, and metadata services of clouds, which reveal credentials. No I/O.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Format that [`CallbackAllowlist::parse`] accepts, for messages.
pub const EXPECTED: &str = "a list such as loopback, 169.254.1.0/24, 10.0.0.1, hooks.internal or *";

/// Networks that are denied unless they are listed. Private networks are not denied: a cluster's services are there.
const DENIED_NETWORKS: [IpNet; 16] = [
    // Unspecified addresses, which reach this host, and their network; loopback.
    v4(0, 0, 0, 0, 8),
    v4(127, 0, 0, 0, 8),
    v6(0, 0, 0, 128),
    v6(0, 0, 1, 128),
    // Link-local; most metadata services are there.
    v4(169, 254, 0, 0, 16),
    v6(0xfe80, 0, 0, 10),
    // Multicast and broadcast.
    v4(224, 0, 0, 0, 4),
    v4(255, 255, 255, 255, 32),
    v6(0xff00, 0, 0, 8),
    // Other metadata services: Alibaba, Azure, Oracle; EC2, Google and Scaleway over IPv6.
    v4(100, 100, 100, 200, 32),
    v4(168, 63, 129, 16, 32),
    v4(192, 0, 0, 192, 32),
    v6(0xfd00, 0xec2, 0x254, 128),
    v6(0xfd20, 0xce, 0x254, 128),
    v6(0xfd00, 0x42, 0x42, 128),
    // Site-local, the predecessor of fc00::/7.
    v6(0xfec0, 0, 0, 10),
];

const LOOPBACK_NETWORKS: [IpNet; 2] = [v4(127, 0, 0, 0, 8), v6(0, 0, 1, 128)];

const ALL_ADDRESSES: [IpNet; 2] = [v4(0, 0, 0, 0, 0), v6(0, 0, 0, 0)];

/// Exceptions from the denied networks. The default has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallbackAllowlist {
    networks: Vec<IpNet>,
    /// In lower case. A listed name is permitted at any address that it resolves to.
    hosts: Vec<String>,
}

const fn v4(a: u8, b: u8, c: u8, d: u8, bits: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), bits))
}

/// `first:second::last/bits`
const fn v6(first: u16, second: u16, last: u16, bits: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, last), bits))
}

/// Parses `10.0.0.0/8`, `fd00::/8`, or an address. An IPv6 address may be in brackets.
fn parse_network(text: &str) -> Option<IpNet> {
    let unbracketed = text.strip_prefix('[').and_then(|rest| {
        let (address, bits) = rest.split_once(']')?;
        (bits.is_empty() || bits.starts_with('/')).then(|| format!("{address}{bits}"))
    });
    let text = unbracketed.as_deref().unwrap_or(text);
    text.parse().ok().or_else(|| Some(IpNet::from(text.parse::<IpAddr>().ok()?)))
}

impl CallbackAllowlist {
    /// Parses a list, separated by commas: networks, addresses, host names, `loopback`, or `*` for everything.
    /// Returns `None` if an entry is none of these.
    pub fn parse(text: &str) -> Option<Self> {
        let mut allow = Self::default();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            if entry == "*" {
                allow.networks.extend(ALL_ADDRESSES);
            } else if entry.eq_ignore_ascii_case("loopback") {
                allow.networks.extend(LOOPBACK_NETWORKS);
            } else if let Some(network) = parse_network(entry) {
                allow.networks.push(network);
            } else {
                allow.hosts.push(host_name(entry)?);
            }
        }
        Some(allow)
    }

    /// Returns whether a callback to `host` may connect to `address`, to which the host resolves.
    pub fn permits(&self, host: &str, address: IpAddr) -> bool {
        let host = host.strip_suffix('.').unwrap_or(host);
        if self.hosts.iter().any(|listed| listed.eq_ignore_ascii_case(host)) {
            return true;
        }
        equivalent_addresses(address).all(|form| self.permits_address(form))
    }

    fn permits_address(&self, address: IpAddr) -> bool {
        let contains_address = |network: &IpNet| network.contains(&address);
        !DENIED_NETWORKS.iter().any(contains_address) || self.networks.iter().any(contains_address)
    }
}

/// Returns `address` in its canonical form, and the IPv4 addresses that it reaches through a translator or tunnel.
///
/// The IPv4-mapped form is only another notation. The other forms are distinct addresses.
pub fn equivalent_addresses(address: IpAddr) -> impl Iterator<Item = IpAddr> {
    let address = address.to_canonical();
    let inner = match address {
        IpAddr::V6(address) => embedded_ipv4(address),
        IpAddr::V4(_) => [None, None],
    };
    std::iter::once(address).chain(inner.into_iter().flatten().map(IpAddr::V4))
}

/// Returns a valid host name in lower case, without its last dot.
fn host_name(text: &str) -> Option<String> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let labels = || name.split('.');
    let well_formed = labels().all(|label| !label.is_empty() && label.bytes().all(letter));
    // No top-level domain is a number, so this is a malformed address.
    let numeric = labels().next_back().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
    (well_formed && !numeric).then(|| name.to_ascii_lowercase())
}

/// Returns the IPv4 addresses that an IPv6 address reaches through a translator or tunnel.
fn embedded_ipv4(address: Ipv6Addr) -> [Option<Ipv4Addr>; 2] {
    let part =
        |high: u16, low: u16| Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
    match address.segments() {
        // `::` and `::1`
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => [None, None],
        // IPv4-compatible; translated (RFC 2765); NAT64.
        [0, 0, 0, 0, 0, 0, a, b]
        | [0, 0, 0, 0, 0xffff, 0, a, b]
        | [0x64, 0xff9b, 0, 0, 0, 0, a, b] => [part(a, b), None],
        // Local-use NAT64: after a prefix of 96 bits, or of 48 bits with a zero byte inside the address. An address of
        // zeros is the padding of the other form.
        [0x64, 0xff9b, 1, a, b, c, d, e] => [part(d, e), part(a, b << 8 | c >> 8)]
            .map(|inner| inner.filter(|inner| !inner.is_unspecified())),
        // 6to4
        [0x2002, a, b, ..] => [part(a, b), None],
        // Teredo: the server, and the client with its bits inverted.
        [0x2001, 0, a, b, _, _, c, d] => [part(a, b), part(!c, !d)],
        // ISATAP
        [_, _, _, _, 0 | 0x200, 0x5efe, a, b] => [part(a, b), None],
        _ => [None, None],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(list: &str, expect: bool, addresses: &[&str]) {
        let allow = CallbackAllowlist::parse(list).unwrap();
        for address in addresses {
            let got = allow.permits("host.example", address.parse().unwrap());
            assert_eq!(got, expect, "{address} with {list:?}");
        }
    }

    #[test]
    fn by_default_local_addresses_are_denied_and_private_ones_are_not() {
        check(
            "",
            true,
            &[
                "1.1.1.1",
                "10.1.2.3",
                "172.16.0.1",
                "192.168.1.1",
                "100.64.0.1",
                "169.253.255.255",
                "2606:4700::1111",
                "fd00::1",
                "fc00::1",
            ],
        );
        check(
            "",
            false,
            &[
                "0.0.0.0",
                "0.1.2.3",
                "127.0.0.1",
                "127.255.0.9",
                "169.254.169.254",
                "224.0.0.1",
                "239.1.1.1",
                "255.255.255.255",
                "100.100.100.200",
                "168.63.129.16",
                "192.0.0.192",
                "::",
                "::1",
                "fe80::1",
                "febf::1",
                "fec0::1",
                "ff02::1",
                "fd00:ec2::254",
                "fd20:ce::254",
                "fd00:42::42",
            ],
        );
    }

    #[test]
    fn an_embedded_address_is_checked() {
        check(
            "",
            false,
            &[
                "::ffff:127.0.0.1",
                "::ffff:169.254.169.254",
                "::127.0.0.1",
                "::ffff:0:127.0.0.1",
                "64:ff9b::169.254.169.254",
                "64:ff9b:1::127.0.0.1",
                // With a prefix of 48 bits.
                "64:ff9b:1:7f00:0:100::",
                "2002:7f00:1::",
                "2002:a9fe:a9fe::1",
                // Teredo with client 127.0.0.1, its bits inverted, and with server 127.0.0.1.
                "2001:0:101:101:0:0:80ff:fffe",
                "2001:0:7f00:1::",
                "2a00::5efe:127.0.0.1",
            ],
        );
        check(
            "",
            true,
            &[
                "::ffff:10.0.0.1",
                "64:ff9b::1.1.1.1",
                "64:ff9b:1::1.1.1.1",
                "64:ff9b:1:101:1:100::",
                "2002:101:101::1",
            ],
        );
        check("loopback", true, &["::ffff:127.0.0.1", "64:ff9b::127.0.0.1"]);
    }

    #[test]
    fn only_listed_addresses_are_permitted() {
        check("loopback", true, &["127.0.0.1", "127.1.2.3", "::1", "10.0.0.1"]);
        check("loopback", false, &["0.0.0.0", "::", "169.254.169.254"]);
        check("127.0.0.1", true, &["127.0.0.1", "::ffff:127.0.0.1"]);
        check("127.0.0.1", false, &["127.0.0.2", "::1"]);
        check("169.254.8.3/16, [fe80::]/10", true, &["169.254.169.254", "fe80::7"]);
        check("169.254.0.0/24,::1", false, &["169.254.1.1", "fe80::7"]);
        check("::1", true, &["::1"]);
        check(" * ", true, &["127.0.0.1", "::1", "169.254.169.254", "ff02::1", "::7f00:1"]);
        check("0.0.0.0/0", true, &["127.0.0.1"]);
        check("0.0.0.0/0", false, &["::1"]);
    }

    #[test]
    fn a_listed_host_is_permitted_at_any_address() {
        let allow = CallbackAllowlist::parse("Hooks.internal., other").unwrap();
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        for (host, expect) in [
            ("hooks.internal", true),
            ("HOOKS.INTERNAL.", true),
            ("other", true),
            ("a.hooks.internal", false),
            ("hooks.internal.evil.example", false),
        ] {
            assert_eq!(allow.permits(host, loopback), expect, "{host}");
        }
    }

    #[test]
    fn a_malformed_list_is_rejected() {
        for text in [
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "300.1.1.1",
            "10.0.0.1/",
            "a b",
            "a..b",
            "http://a",
            "a:80",
            "*.a",
            "[::1",
            "::1]",
            "[::1]x",
            "[10.0.0.1]8",
            "127.1",
        ] {
            assert_eq!(CallbackAllowlist::parse(text), None, "{text:?}");
        }
    }
}
