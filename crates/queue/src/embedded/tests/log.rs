//! Log lines for calls that cannot be decoded.

use std::fs::File;
use std::sync::Arc;

use serde_json::Value;

use super::*;

#[tokio::test]
async fn an_undecodable_call_is_logged_with_its_id() {
    let (directory, log) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let log = log.path().join("log");
    let writer = Arc::new(File::create(&log).unwrap());
    let subscriber = tracing_subscriber::fmt().json().with_writer(writer).finish();
    let _logging = tracing::subscriber::set_default(subscriber);
    let queue = open(&directory);
    // No gateway accepts such a name; a later version may.
    let function = Function { name: "a/b".to_owned(), namespace: "fn".to_owned() };
    queue.publish(QueuedCall { function, ..call("a") }, None).await.unwrap();
    queue.publish(call("b"), None).await.unwrap();
    let taken = [queue.receive(CONCURRENCY).await.unwrap().call.id];
    assert_eq!(taken, ["b"]);
    queue.close().await;
    drop(queue);
    let _again = open(&directory);
    let log = std::fs::read_to_string(&log).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let errors: Vec<_> = lines.filter(|line| line["level"] == "ERROR").collect();
    assert!(errors.iter().all(|line| line["fields"]["call_id"] == "a"), "{log}");
    // Once when it was to be delivered, and once when the file was opened.
    assert_eq!(errors.len(), 2, "{log}");
}
