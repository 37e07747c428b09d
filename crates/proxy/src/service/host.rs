//! Syntax of a host in `Host` and in a target in absolute form (RFC 9110, 7.2, and RFC 3986, 3.2.2).

use std::net::Ipv6Addr;

/// Returns whether `host` is a host with or without a port, or empty, as for a target without an authority.
pub(super) fn is_host(host: &[u8]) -> bool {
    match host.iter().position(|byte| !IS_NAME_BYTE[usize::from(*byte)]) {
        None => true,
        Some(at) => is_host_with_port(host, at),
    }
}

/// Bytes allowed in a name besides escapes. A table, since every request has a host.
const IS_NAME_BYTE: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < table.len() {
        table[byte] = matches!(
            byte as u8,
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~'
                | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'='
        );
        byte += 1;
    }
    table
};

/// The same check for a host whose first byte that is not allowed in a name is at `at`.
fn is_host_with_port(host: &[u8], at: usize) -> bool {
    match host[at] {
        b':' => at > 0 && is_port(&host[at + 1..]),
        b'[' if at == 0 => is_ip_literal_with_port(&host[1..]),
        b'%' => {
            let colon = memchr::memchr(b':', host);
            let (name, port) = host.split_at(colon.unwrap_or(host.len()));
            is_escaped_name(name) && port.get(1..).is_none_or(is_port)
        }
        _ => false,
    }
}

/// Checks an IPv6 address, its closing bracket and the port. Other literals (`v1.x`) are rejected: they cannot be
/// called.
fn is_ip_literal_with_port(literal: &[u8]) -> bool {
    let Some(end) = memchr::memchr(b']', literal) else { return false };
    let address = std::str::from_utf8(&literal[..end]).unwrap_or_default();
    let port = &literal[end + 1..];
    address.parse::<Ipv6Addr>().is_ok()
        && (port.is_empty() || port.strip_prefix(b":").is_some_and(is_port))
}

fn is_escaped_name(name: &[u8]) -> bool {
    let mut pieces = name.split(|byte| *byte == b'%');
    let is_name = |piece: &[u8]| piece.iter().all(|byte| IS_NAME_BYTE[usize::from(*byte)]);
    pieces.next().is_some_and(is_name)
        && pieces.all(|piece| {
            piece.split_at_checked(2).is_some_and(|(digits, rest)| {
                digits.iter().all(u8::is_ascii_hexdigit) && is_name(rest)
            })
        })
}

/// Checks a port: any number of digits up to 65535 in value, or none.
fn is_port(digits: &[u8]) -> bool {
    let port = digits.iter().try_fold(0_u16, |port, digit| {
        let digit = digit.is_ascii_digit().then(|| u16::from(digit - b'0'))?;
        port.checked_mul(10)?.checked_add(digit)
    });
    port.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_and_addresses_with_or_without_a_port() {
        for host in [
            "",
            "g",
            "g.test:8080",
            "g.test.",
            "g:",
            "g:0080",
            "g:65535",
            "127.0.0.1:80",
            "a_b",
            "a,b;c=d!e",
            "xn--bcher-kva.test",
            "a%20b",
            "%C3%BC.test:80",
            "a%3ab",
            "[::1]",
            "[::1]:8080",
            "[::]:",
            "[2001:db8::A]:80",
            "[::ffff:192.0.2.1]",
        ] {
            assert!(is_host(host.as_bytes()), "{host}");
        }
    }

    #[test]
    fn an_ambiguous_host_is_rejected() {
        for host in [
            "[]",
            "[]:8",
            "[",
            "]",
            "[]]",
            "[g]",
            "[1.2.3.4]",
            "[::1",
            "::1",
            "::1]",
            "[::1]x",
            "[::1]80",
            "[::1]:x",
            "[::1]:65536",
            "[[::1]]",
            "[::1][::1]",
            "g[::1]",
            "[::1%25eth0]",
            "[fe80::1%eth0]",
            "[v1.a:b]",
            "[:::1]",
            "[::12345]",
            "[ ::1]",
            ":80",
            ":",
            "g:x",
            "g:-1",
            "g:+1",
            "g:65536",
            "g:80:80",
            "g:99999999999999999999",
            "a b",
            "a/b",
            "a\\b",
            "a@b",
            "a?b",
            "a#b",
            "g\u{0}",
            "g\u{7f}",
            "ü",
            "<g>",
            "\"g\"",
            "%",
            "g%",
            "g%2",
            "g%zz",
            "g%2:80",
            "%20:x",
            "%20:80:80",
            "a%5",
            "%%20",
        ] {
            assert!(!is_host(host.as_bytes()), "{host}");
        }
    }
}
