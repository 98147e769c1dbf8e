//! The one binary: lifl up, lifl demo, lifl status and every component.
