//! Tells when something happens in a folder.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
use tokio::io::unix::AsyncFd;

/// A folder that is watched, inside a tokio runtime.
#[derive(Debug)]
pub struct FolderWatch {
    inotify: AsyncFd<OwnedFd>,
    folder: PathBuf,
}

// === impl FolderWatch ===

impl FolderWatch {
    /// Watches a folder for these changes.
    ///
    /// # Errors
    /// When there is no such folder, or it must not be read.
    #[expect(
        deprecated,
        reason = "its successor is unsafe for types that lie about their descriptor; an OwnedFd does not"
    )]
    pub fn new(folder: &Path, changes: WatchFlags) -> io::Result<Self> {
        let inotify = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        add_watch(&inotify, folder, changes)?;
        Ok(Self { inotify: AsyncFd::new(inotify)?, folder: folder.to_owned() })
    }

    /// Waits for a change; whatever else has changed by then is told with it.
    ///
    /// # Errors
    /// When the folder itself is gone: nothing more would be told.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = Reader::new(self.inotify.get_ref(), &mut buffer);
            let (mut any, mut over) = (false, false);
            loop {
                match reader.next() {
                    Ok(event) => {
                        any = true;
                        over |= event.events().contains(ReadFlags::IGNORED);
                    }
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
            if over {
                return Err(io::Error::new(io::ErrorKind::NotFound, format!("{} is gone", self.folder.display())));
            }
            if any {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn changes_that_are_asked_for_are_told_and_the_end_of_the_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("netns");
        let leaves = WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::ONLYDIR;
        assert!(FolderWatch::new(&inside, leaves).is_err(), "there is none");
        fs::create_dir(&inside).unwrap();
        let watch = FolderWatch::new(&inside, leaves).unwrap();
        for name in ["a", "b", "c"] {
            fs::write(inside.join(name), "").unwrap();
        }
        let told = tokio::select! {
            biased;
            told = watch.changed() => Some(told),
            () = tokio::task::yield_now() => None,
        };
        assert!(told.is_none(), "{told:?}");
        fs::remove_file(inside.join("a")).unwrap();
        watch.changed().await.unwrap();
        fs::rename(inside.join("b"), folder.path().join("b")).unwrap();
        watch.changed().await.unwrap();
        fs::remove_dir_all(&inside).unwrap();
        assert!(watch.changed().await.unwrap_err().to_string().ends_with("netns is gone"));
        assert!(FolderWatch::new(&inside, leaves).is_err());
    }
}
