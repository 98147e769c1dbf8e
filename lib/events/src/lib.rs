//! CloudEvents over HTTP: a borrowed view of the head, content modes, control events.
