//! Copies of data directories, small disks, and flipped bits.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::seed::Rng;

/// Copies a folder and everything in it.
///
/// # Errors
///
/// If it cannot be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// All files below a folder whose names end like this, in the order of their paths.
///
/// # Errors
///
/// If it cannot be read.
pub fn ending(folder: &Path, suffix: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(ending(&path, suffix)?);
        } else if path.to_string_lossy().ends_with(suffix) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Flips one random bit in a byte of a file that is not zero, and tells where.
///
/// # Errors
///
/// If the file cannot be read or written, or has zeros only.
pub fn flip_a_bit(file: &Path, rng: &mut Rng) -> Result<String> {
    let mut bytes = fs::read(file)?;
    let used: Vec<_> = (0..bytes.len()).filter(|index| bytes[*index] != 0).collect();
    ensure!(!used.is_empty(), "{} is empty", file.display());
    let index = used[usize::try_from(rng.below(used.len() as u64))?];
    let bit = rng.below(8);
    bytes[index] ^= 1 << bit;
    fs::write(file, &bytes)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    Ok(format!("bit {bit} of byte {index} of {name}"))
}

/// A disk of its own for a data directory. Dropping it unmounts it.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts a disk of so many MiB; `None` if this process may not mount.
    ///
    /// # Errors
    ///
    /// If the folder cannot be made.
    pub fn mount(path: &Path, mebibytes: u64) -> Result<Option<Self>> {
        fs::create_dir_all(path)?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"])
            .arg(path)
            .output()
            .context("there is no `mount`")?;
        if mounted.status.success() {
            return Ok(Some(Self { path: path.into() }));
        }
        eprintln!("SKIPPED: {}", String::from_utf8_lossy(&mounted.stderr).trim());
        Ok(None)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills it until this many KiB are left.
    ///
    /// # Errors
    ///
    /// If it cannot be written for another reason than being full.
    pub fn fill(&self, leave_kibibytes: u64) -> Result<()> {
        let stat = rustix::fs::statvfs(&self.path)?;
        let free = stat.f_bavail * stat.f_frsize;
        let bytes = free.saturating_sub(leave_kibibytes << 10);
        fs::write(self.filler(), vec![1; usize::try_from(bytes)?])?;
        Ok(())
    }

    /// Gives back what was filled.
    ///
    /// # Errors
    ///
    /// If it was not filled.
    pub fn free(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a server that is about to be killed may still have files open.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
