// Rows whose width is no multiple of kLanes, for targets without masked loads.

// Every load and store of fewer than kLanes elements goes through a buffer, so that nothing beyond
// a row is touched.
template <class T>
inline F load_some(const T* p, int n) {
    if (n >= kLanes) return load(p);
    T buffer[kLanes] = {};
    __builtin_memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}

template <class T>
inline void store_some(T* p, F x, int n) {
    if (n >= kLanes) {
        store(p, x);
        return;
    }
    T buffer[kLanes];
    store(buffer, x);
    __builtin_memcpy(p, buffer, n * sizeof(T));
}
