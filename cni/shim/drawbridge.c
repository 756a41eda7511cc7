/* The CNI executable. It knows nothing of networking: it hands its environment, its standard input and the pod's network
 * namespace to the agent over a unix socket, and prints what comes back. VERSION it answers itself, agent or no agent.
 *
 * Request:  magic "DBR1", length of environment, length of configuration (32 bits, network order);
 *           "NAME=value\0" for each variable; the configuration. The namespace travels as a descriptor with the header.
 * Reply:    one byte as soon as the agent has taken the connection; then exit status and length (32 bits each); JSON.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define VERSIONS "\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\""
enum { INVALID_ENVIRONMENT = 4, IO_FAILURE = 5, INVALID_CONFIGURATION = 7, TRY_AGAIN_LATER = 11 };
enum { MAX_CONFIGURATION = 1 << 20, MAX_VARIABLE = 32 << 10, MAX_REPLY = 4 << 20 };
/* A running agent takes a connection at once. To connect and to be taken have 0.9 s each: an agent that is away or stuck
 * is reported within 2 s. The reply has 30 s: more than the agent's own bounds for an ADD (10 s for an unknown pod, 10 s
 * for a delegated IPAM plugin), less than the two minutes after which a kubelet gives up without a reason. */
enum { TAKEN_MS = 900, REPLY_MS = 30000, STDIN_MS = 10000 };

static char configuration[MAX_CONFIGURATION + 1];
static char version[16] = "1.0.0";

static void print_json_string(const char *text) {
	putchar('"');
	for (; *text; text++) {
		unsigned char c = (unsigned char)*text;
		if (c == '"' || c == '\\') printf("\\%c", c);
		else if (c < 0x20 || c >= 0x7f) printf("\\u%04x", c);
		else putchar(c);
	}
	putchar('"');
}

_Noreturn static void fail(int code, const char *message, const char *details) {
	printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":", version, code);
	print_json_string(message);
	printf(",\"details\":");
	print_json_string(details);
	printf("}\n");
	fflush(stdout);
	exit(EXIT_FAILURE);
}

static int64_t now_ms(void) {
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Wait until fd is ready; false when the deadline has passed. */
static bool wait_for(int fd, short events, int64_t deadline) {
	for (;;) {
		int64_t left = deadline - now_ms();
		struct pollfd entry = {.fd = fd, .events = events};
		int ready = poll(&entry, 1, left > 0 ? (int)left : 0);
		if (ready > 0) return true;
		if (ready == 0 || errno != EINTR) return false;
	}
}

/* Read until size bytes or the end; the number read, or -1 with errno set (ETIMEDOUT at the deadline). */
static ssize_t read_all(int fd, char *into, size_t size, int64_t deadline) {
	size_t done = 0;
	while (done < size) {
		if (!wait_for(fd, POLLIN, deadline)) return errno = ETIMEDOUT, -1;
		ssize_t got = read(fd, into + done, size - done);
		if (got == 0) break;
		if (got > 0) done += (size_t)got;
		else if (errno != EINTR && errno != EAGAIN) return -1;
	}
	return (ssize_t)done;
}

static bool send_all(int fd, const char *data, size_t size, int64_t deadline) {
	while (size > 0) {
		if (!wait_for(fd, POLLOUT, deadline)) return errno = ETIMEDOUT, false;
		ssize_t sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (sent > 0) data += sent, size -= (size_t)sent;
		else if (errno != EINTR && errno != EAGAIN) return false;
	}
	return true;
}

/* Only digits and dots are taken, so the value can be printed as it is; anything else leaves the default. */
static void find_version(void) {
	const char *at = strstr(configuration, "\"cniVersion\"");
	if (at == NULL) return;
	at += strlen("\"cniVersion\"");
	at += strspn(at, " \t\r\n:");
	size_t length = *at == '"' ? strspn(at + 1, "0123456789.") : 0;
	if (length > 0 && length < sizeof version && at[1 + length] == '"')
		memcpy(version, at + 1, length), version[length] = '\0';
}

_Noreturn static void no_answer(const char *path, const char *why) {
	char message[256];
	snprintf(message, sizeof message, "the drawbridge agent does not answer at %s: %s", path, why);
	fail(TRY_AGAIN_LATER, message, "is `drawbridge agent` running on this node?");
}

static int connect_to_agent(const char *path) {
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timeval timeout = {.tv_usec = TAKEN_MS * 1000};
	if (strlen(path) >= sizeof address.sun_path) fail(INVALID_ENVIRONMENT, "DRAWBRIDGE_CNI_SOCKET is too long", path);
	memcpy(address.sun_path, path, strlen(path));
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0) fail(IO_FAILURE, "no socket can be made", strerror(errno));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
	int64_t deadline = now_ms() + TAKEN_MS;
	while (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
		if (errno == EINTR && now_ms() < deadline) continue;
		no_answer(path, strerror(errno));
	}
	return fd;
}

/* The header goes with the descriptor of the namespace, if there is one. */
static bool send_header(int fd, const uint32_t header[3], int netns) {
	union { char bytes[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = {.bytes = {0}};
	struct iovec part = {.iov_base = (void *)(uintptr_t)header, .iov_len = 12};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	if (netns >= 0) {
		message.msg_control = control.bytes;
		message.msg_controllen = sizeof control.bytes;
		struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(sizeof netns);
		memcpy(CMSG_DATA(rights), &netns, sizeof netns);
	}
	ssize_t sent;
	do sent = sendmsg(fd, &message, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent == (ssize_t)part.iov_len;
}

static size_t append(char *block, size_t length, const char *name, const char *value) {
	if (value == NULL) return length;
	if (strlen(value) > MAX_VARIABLE) fail(INVALID_ENVIRONMENT, "an environment variable is longer than 32 KiB", name);
	return length + (size_t)sprintf(block + length, "%s=%s", name, value) + 1;
}

int main(void) {
	static const char *const names[] = {"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"};
	static char block[8 * (MAX_VARIABLE + 64)];
	signal(SIGPIPE, SIG_IGN);

	ssize_t size = read_all(STDIN_FILENO, configuration, sizeof configuration, now_ms() + STDIN_MS);
	if (size < 0) fail(IO_FAILURE, "standard input cannot be read", strerror(errno));
	if (size > MAX_CONFIGURATION) fail(INVALID_CONFIGURATION, "the network configuration is longer than 1 MiB", "");
	configuration[size] = '\0';
	find_version();
	const char *command = getenv("CNI_COMMAND");
	if (command != NULL && strcmp(command, "VERSION") == 0) {
		printf("{\"cniVersion\":\"%s\",\"supportedVersions\":[" VERSIONS "]}\n", version);
		return fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
	}

	size_t length = 0;
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) length = append(block, length, names[i], getenv(names[i]));
	const char *netns_path = getenv("CNI_NETNS");
	int netns = -1;
	if (netns_path != NULL && *netns_path != '\0') {
		/* Not blocking, for a path that turns out to be a pipe. Whether its absence matters, the agent decides. */
		netns = open(netns_path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
		if (netns < 0) length = append(block, length, "NETNS_ERROR", strerror(errno));
	}

	const char *path = getenv("DRAWBRIDGE_CNI_SOCKET");
	if (path == NULL || *path == '\0') path = "/run/drawbridge/cni.sock";
	int fd = connect_to_agent(path);
	const uint32_t header[3] = {htonl(0x44425231), htonl((uint32_t)length), htonl((uint32_t)size)};
	int64_t taken = now_ms() + TAKEN_MS;
	char hello;
	if (!send_header(fd, header, netns) || !send_all(fd, block, length, taken) ||
	    !send_all(fd, configuration, (size_t)size, taken))
		no_answer(path, strerror(errno));
	ssize_t greeted = read_all(fd, &hello, 1, taken);
	if (greeted != 1) no_answer(path, greeted == 0 ? "it closed the connection" : strerror(errno));

	uint32_t answer[2];
	int64_t deadline = now_ms() + REPLY_MS;
	ssize_t got = read_all(fd, (char *)answer, sizeof answer, deadline);
	if (got < 0 && errno == ETIMEDOUT) fail(TRY_AGAIN_LATER, "the drawbridge agent took the request, but did not reply in time", strerror(errno));
	if (got < (ssize_t)sizeof answer) fail(TRY_AGAIN_LATER, "the drawbridge agent ended before it replied", "try again");
	size_t reply_size = ntohl(answer[1]);
	char *reply = reply_size <= MAX_REPLY ? malloc(reply_size + 1) : NULL;
	if (reply == NULL || read_all(fd, reply, reply_size, deadline) != (ssize_t)reply_size)
		fail(TRY_AGAIN_LATER, "the drawbridge agent's reply is cut short", "try again");
	bool written = fwrite(reply, 1, reply_size, stdout) == reply_size && fflush(stdout) == 0;
	return written && ntohl(answer[0]) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
