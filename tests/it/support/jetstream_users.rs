//! Queues of users with different permissions.

use gateway_queue::JobStore as _;
use gateway_queue::jetstream::{Auth, Options};
use tempfile::TempDir;

use crate::support::eventually;
use crate::support::jetstream_queue::{TestQueue, options};
use crate::support::nats::Nats;

impl TestQueue {
    /// A server, a queue whose user may not publish to `denied`, and one without restrictions. Keep the directory.
    pub(crate) async fn restricted(denied: &str) -> (TempDir, Nats, Self, Self) {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("nats.conf");
        let permissions = format!("{{ publish: {{ deny: \"{denied}\" }} }}");
        let users = format!(
            "users = [ {{ user: restricted, password: p, permissions: {permissions} }}, \
             {{ user: other, password: p }} ]"
        );
        let config = format!("authorization {{ {users} }}\nno_auth_user: other");
        std::fs::write(&path, config).unwrap();
        let nats = Nats::start_with(&["-c", path.to_str().unwrap()]);
        let other = Self::of_user("other", options(&nats)).await;
        let restricted = Self::of_user("restricted", options(&nats)).await;
        (directory, nats, restricted, other)
    }

    /// A connected queue of this user.
    pub(crate) async fn of_user(user: &str, options: Options) -> Self {
        let auth = Auth::Password { user: user.to_owned(), password: "p".to_owned() };
        let queue = Self::open(Options { auth, ..options }).await;
        eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
        queue
    }
}
