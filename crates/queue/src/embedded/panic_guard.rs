//! Converts panics of redb into errors. redb trusts its file once it is open: a page that was changed on the disk can
//! make it panic. All access to the file goes through this module.

use std::any::Any;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::embedded::tables::Result;

/// Calls `access` and converts a panic into a corruption error. After that, values that `access` modified may only be
/// dropped.
pub(super) fn catch_panic<T>(access: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(access)).unwrap_or_else(|panic| {
        Err(redb::Error::Corrupted(format!("the file is corrupted: {}", panic_message(&*panic))))
    })
}

/// Drops `value`, and ignores a panic.
pub(super) fn drop_catching_panic<T>(value: T) {
    let _ = catch_panic(|| {
        drop(value);
        Ok(())
    });
}

/// Returns whether `error` means that the file is damaged, so that a retry cannot succeed.
pub(super) fn is_corruption(error: &redb::Error) -> bool {
    match error {
        redb::Error::Corrupted(_)
        | redb::Error::RepairAborted
        | redb::Error::UpgradeRequired(_) => true,
        redb::Error::Io(error) => {
            matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof)
        }
        redb::Error::TableTypeMismatch { .. }
        | redb::Error::TypeDefinitionChanged { .. }
        | redb::Error::TableIsMultimap(_) => true,
        _ => false,
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no reason given")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_reported_as_corruption() {
        let panicked = catch_panic(|| -> Result<()> { panic!("page {}", 7) }).unwrap_err();
        assert!(is_corruption(&panicked) && panicked.to_string().contains("page 7"), "{panicked}");
        let full = redb::Error::Io(std::io::Error::from(ErrorKind::StorageFull));
        assert!(!is_corruption(&catch_panic(|| -> Result<()> { Err(full) }).unwrap_err()));
        assert!(catch_panic(|| Ok(())).is_ok());
    }
}
