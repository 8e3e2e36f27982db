// What this library was built from, in a file of its own: it alone is compiled again whenever anything changes.
#define STRING(x) #x
#define AS_STRING(x) STRING(x)

extern const char* const kSourceHash = AS_STRING(GPTKERNELS_SOURCE_HASH);
extern const char* const kArchs = AS_STRING(GPTKERNELS_ARCHS);  // such as 80.90a
