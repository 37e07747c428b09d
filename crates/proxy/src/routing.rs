//! Resolves the path of a request, once. No I/O.

use gateway_http::names::{ASYNC_FUNCTION_PREFIX, FUNCTION_PREFIX};
use http::Uri;
use http::uri::PathAndQuery;

/// Where a path leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// To a function: a synchronous call.
    Function,
    /// To the queue: a call to enqueue, or a queued call by its id.
    Queue,
    /// To the API, or nowhere.
    Api,
}

/// A resolved path. It refers to the path by position, and stays valid for the request that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteMatch {
    pub destination: Destination,
    /// Start and end of the function's name in the path; both 0 without one. The target of a request has less than
    /// 64 KiB.
    name: (u16, u16),
}

impl RouteMatch {
    /// Resolves `path`, with or without a query.
    pub fn of(path: &str) -> Self {
        let (destination, start) = if path.starts_with(FUNCTION_PREFIX) {
            (Destination::Function, FUNCTION_PREFIX.len())
        } else if path.starts_with(ASYNC_FUNCTION_PREFIX) {
            (Destination::Queue, ASYNC_FUNCTION_PREFIX.len())
        } else {
            return Self { destination: Destination::Api, name: (0, 0) };
        };
        let rest = &path.as_bytes()[start..];
        let length = memchr::memchr2(b'/', b'?', rest).unwrap_or(rest.len());
        let position = |at: usize| u16::try_from(at).unwrap_or(u16::MAX);
        Self { destination, name: (position(start), position(start + length)) }
    }

    /// Returns whether this is a synchronous call.
    pub fn is_call(self) -> bool {
        self.destination == Destination::Function
    }

    /// Returns the segment of `path` that names a function, and possibly its namespace.
    pub fn name(self, path: &str) -> &str {
        path.get(self.name.0.into()..self.name.1.into()).unwrap_or_default()
    }

    /// Returns the part of `path` after the function's name: empty, or it begins with `/` or `?`.
    pub fn rest(self, path: &str) -> &str {
        path.get(self.name.1.into()..).unwrap_or_default()
    }

    /// Returns the path after the function's name, and the query: the target that a function called directly receives.
    pub fn function_target(self, uri: &Uri) -> Uri {
        let whole = uri.path_and_query().map_or("/", PathAndQuery::as_str);
        let rest = self.rest(whole);
        let rest = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
        // A suffix of a valid path is valid.
        rest.parse().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_to_a_function_the_queue_or_the_api() {
        for (path, destination, name, rest) in [
            ("/function/echo", Destination::Function, "echo", ""),
            ("/function/echo.dev/a/b", Destination::Function, "echo.dev", "/a/b"),
            ("/function/echo?x=1/2", Destination::Function, "echo", "?x=1/2"),
            ("/function/", Destination::Function, "", ""),
            ("/function//x", Destination::Function, "", "/x"),
            ("/async-function/echo", Destination::Queue, "echo", ""),
            ("/async-function/echo/a?b", Destination::Queue, "echo", "/a?b"),
            ("/function", Destination::Api, "", "/function"),
            ("/system/functions", Destination::Api, "", "/system/functions"),
            ("*", Destination::Api, "", "*"),
        ] {
            let route = RouteMatch::of(path);
            let found = (route.destination, route.name(path), route.rest(path));
            assert_eq!(found, (destination, name, rest), "{path}");
        }
    }

    #[test]
    fn a_direct_call_receives_the_path_after_the_name() {
        let target = |uri: &str| {
            let route = RouteMatch::of(uri);
            route.function_target(&uri.parse().unwrap()).to_string()
        };
        assert_eq!(target("/function/echo"), "/");
        assert_eq!(target("/function/echo?q=1"), "/?q=1");
        assert_eq!(target("/function/echo/a%2Fb//c?q"), "/a%2Fb//c?q");
    }
}
